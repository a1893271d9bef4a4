// Predictions and the confusion matrix, without full-resolution logits or a full-resolution prediction in between.
//
// Fuses upsampling, argmax and the histogram. Fewest bytes: the logits and the labels read once.
#include "cpu/tiles.h"

namespace segadv::cpu {
namespace {

template <class Tiles>
SEGADV_CLONES void confusion_item(const ConfusionParams& params, Tiles& tiles, int64_t item, int64_t* counts,
                                  int64_t* bad) {
  using A = typename Tiles::A;
  const Problem& problem = params.problem;
  const int64_t classes = problem.logits.size[1];
  int32_t y[kMaxTile], best_class[kMaxTile];
  A best[kMaxTile];
  int64_t first_bad = kNoBadLabel;
  tiles.walk(item, [&](const auto& tile) SEGADV_BODY {
    find_best(tile, classes, best, best_class);
    if (params.prediction) store_classes(params.prediction, tile, best_class);
    if (params.matrix) {
      load_labels(problem, tile, y, &first_bad);
      for (int p = 0; p < tile.count; ++p) {
        if (y[p] >= 0) ++counts[y[p] * classes + best_class[p]];
      }
    }
  });
  *bad = first_bad;
}

}  // namespace

int64_t confusion(const ConfusionParams& params) {
  int64_t bad = kNoBadLabel;
  const int64_t cells = params.problem.logits.size[1] * params.problem.logits.size[1];
  const int64_t matrices = params.per_image ? params.problem.logits.size[0] : 1;
  int64_t* matrix = static_cast<int64_t*>(params.matrix.data);
  if (matrix) std::fill(matrix, matrix + matrices * cells, int64_t{0});
  dispatch_tiles(params.problem, {}, [&](auto& tiles) {
    parallel_for(tiles.items(), [&](int64_t item) {
      std::vector<int64_t> counts(matrix ? cells : 0);
      int64_t item_bad = kNoBadLabel;
      confusion_item(params, tiles, item, counts.data(), &item_bad);
      int64_t* to = matrix + (params.per_image ? item / tiles.items_per_image() * cells : 0);
#pragma omp critical(segadv_confusion)  // integers: the order of the items does not matter
      {
        for (size_t i = 0; i < counts.size(); ++i) to[i] += counts[i];
        bad = std::min(bad, item_bad);
      }
    });
  });
  return bad == kNoBadLabel ? -1 : bad;
}

}  // namespace segadv::cpu
