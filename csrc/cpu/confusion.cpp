// Predictions and the confusion matrix, without full-resolution logits or a full-resolution prediction in between.
//
// Fuses upsampling, argmax and the histogram. Fewest bytes: the logits and the labels read once. Resampled, bound by
// arithmetic: for 16 pixels 7 vector operations for each class that can be the largest there (up_tiles.h), of 19
// classes about two.
#include "cpu/tiles.h"
#include "cpu/up_tiles.h"

namespace segadv::cpu {
namespace {

constexpr int64_t kMaxOwnCells = 4096;

// Where an item counts: in a matrix of its own, or in one that all threads share.
struct Counts {
  int64_t* matrix;
  int64_t classes;
  bool shared;
  SEGADV_INLINE void add(int32_t label, int32_t prediction) const {
    if (label < 0) return;
    int64_t& count = matrix[label * classes + prediction];
    if (shared) {
#pragma omp atomic
      ++count;
    } else {
      ++count;
    }
  }
};

template <class S>
SEGADV_INLINE void confusion_item(const ConfusionParams& params, FullTiles<S>& tiles, int64_t item,
                                  const Counts& counts, int64_t* bad) {
  using A = Compute<S>;
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
      for (int p = 0; p < tile.count; ++p) counts.add(y[p], best_class[p]);
    }
  });
  *bad = first_bad;
}

template <class S>
SEGADV_INLINE void confusion_item(const ConfusionParams& params, UpTiles<S>& tiles, int64_t item,
                                  const Counts& counts, int64_t* bad) {
  using A = Compute<S>;
  TileMap<int32_t> y, best_class;
  int64_t first_bad = kNoBadLabel;
  tiles.walk(item, [&](auto& tile) SEGADV_BODY {
    for (int b = 0; b < tile.blocks(); ++b) {
      tile.begin(b);
      const int p0 = tile.p0;
      tile.list();
      for (int r = 0; r < tile.rows; r += kTogether) {
        Rows<A> best, own;
        Rows<int32_t> found;
        find_best(Prediction(), tile, r, y, best, found, own);
        for (int i = 0; i < kTogether; ++i) std::copy_n(found[i], kLanes, best_class[r + i] + p0);
      }
    }
    if (params.prediction) store_classes(params.prediction, tile, best_class);
    if (params.matrix) {
      load_labels(params.problem, tile, y, &first_bad);
      for (int r = 0; r < tile.rows; ++r)
        for (int p = 0; p < tile.count; ++p) counts.add(y[r][p], best_class[r][p]);
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
  // Many classes: a histogram of its own would cost an item more than its pixels, and threads rarely meet in a cell.
  const bool shared = cells > kMaxOwnCells;
  dispatch_tiles(params.problem, {}, 1, [&](auto& tiles) {
    parallel_for(tiles.items(), [&](int64_t item) {
      std::vector<int64_t> own(matrix && !shared ? cells : 0);
      int64_t* to = matrix + (params.per_image ? item / tiles.items_per_image() * cells : 0);
      int64_t item_bad = kNoBadLabel;
      const Counts counts{shared ? to : own.data(), params.problem.logits.size[1], shared};
      on_this_cpu([&]() SEGADV_BODY { confusion_item(params, tiles, item, counts, &item_bad); });
#pragma omp critical(segadv_confusion)  // integers: the order of the items does not matter
      {
        for (size_t i = 0; i < own.size(); ++i) to[i] += own[i];
        bad = std::min(bad, item_bad);
      }
    });
  });
  return bad == kNoBadLabel ? -1 : bad;
}

}  // namespace segadv::cpu
