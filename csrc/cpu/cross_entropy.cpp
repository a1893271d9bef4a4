// Cross-entropy, SegPGD's and CosPGD's weighted forms of it, and their gradients.
//
// Fuses upsampling, log-softmax, label lookup, masking, the pixel weights, the sums per image and the gradient. The
// classes of a tile are read twice (maximum, then exponentials), from the cache the second time. Fewest bytes: the
// logits read once, the gradient written once, labels read once. Bound by the exponentials, one per class and pixel: at
// full resolution 2 to 3 times a copy of the logits into fresh memory (benchmarks/ops.py, floor).
#include "common/softmax.h"
#include "cpu/tiles.h"

namespace segadv::cpu {
namespace {

struct Partial {
  double loss_sum = 0, weight_sum = 0;
  int64_t n_valid = 0;
  int64_t bad = kNoBadLabel;
};

template <class Tiles>
SEGADV_CLONES void cross_entropy_item(const CrossEntropyParams& params, Tiles& tiles, int64_t item, Partial& result) {
  using A = typename Tiles::A;
  const Problem& problem = params.problem;
  const int64_t classes = problem.logits.size[1];
  int32_t y[kMaxTile], best_class[kMaxTile];
  A best[kMaxTile], sum[kMaxTile], squares[kMaxTile], log_sum[kMaxTile], weight[kMaxTile], label_exp[kMaxTile];
  A largest[kMaxTile];
  const int64_t tile_width = tiles.width();
  std::vector<A> exponentials(problem.grad ? classes * tile_width : 0);
  const A* class_weight = static_cast<const A*>(params.class_weight.data);
  const bool cosine = params.loss == Loss::kCosPGD, segpgd = params.loss == Loss::kSegPGD;
  Partial partial;
  tiles.walk(item, [&](const auto& tile) SEGADV_BODY {
    partial.n_valid += load_labels(problem, tile, y, &partial.bad);
    if (segpgd) {
      find_best(tile, classes, best, best_class);
    } else {
      find_best(tile, classes, best);
    }
    for (int p = 0; p < tile.count; ++p) sum[p] = squares[p] = A(0);
    for (int64_t c = 0; c < classes; ++c) {
      A* store = problem.grad ? exponentials.data() + c * tile_width : nullptr;
      if (cosine) {
        SEGADV_SIMD
        for (int p = 0; p < tile.count; ++p) {
          const A e = exp_nonpositive(tile.z(c, p) - best[p]);
          squares[p] += e * e;
        }
      }
      if (store) {
        SEGADV_SIMD
        for (int p = 0; p < tile.count; ++p) {
          const A e = exp_nonpositive(tile.z(c, p) - best[p]);
          sum[p] += e;
          store[p] = e;
        }
      } else {
        SEGADV_SIMD
        for (int p = 0; p < tile.count; ++p) sum[p] += exp_nonpositive(tile.z(c, p) - best[p]);
      }
    }
    // Everything below is once per pixel.
    for (int p = 0; p < tile.count; ++p) {
      const bool valid = y[p] >= 0;
      // Not below 0, where resampling rounds the label's logit otherwise than in the search for the best.
      largest[p] = valid ? best[p] : A(0);
      const A difference = best[p] - tile.z(valid ? y[p] : 0, p);
      const A below_best = difference < A(0) ? A(0) : difference;
      label_exp[p] = cosine ? exp_nonpositive(-below_best) : A(0);
      best[p] = below_best;
    }
    if (segpgd) {
      const A correct = static_cast<A>(params.targeted ? params.lambda : 1.0 - params.lambda);
      const A wrong = static_cast<A>(params.targeted ? 1.0 - params.lambda : params.lambda);
      for (int p = 0; p < tile.count; ++p) weight[p] = best_class[p] == y[p] ? correct : wrong;
    } else if (cosine) {
      for (int p = 0; p < tile.count; ++p) {
        const A c = label_exp[p] / std::sqrt(squares[p]);
        weight[p] = params.targeted ? A(1) - c : c;
      }
    } else if (class_weight) {
      for (int p = 0; p < tile.count; ++p) weight[p] = class_weight[y[p] >= 0 ? y[p] : 0];
    } else {
      for (int p = 0; p < tile.count; ++p) weight[p] = A(1);
    }
    A loss_sum = 0, weight_sum = 0;
#pragma omp simd reduction(+ : loss_sum, weight_sum)
    for (int p = 0; p < tile.count; ++p) {
      const bool valid = y[p] >= 0;
      const A log_normalizer = log_normalizer_of(sum[p]);
      log_sum[p] = valid ? log_normalizer : A(0);
      weight[p] = valid ? weight[p] : A(0);
      best[p] = valid ? (log_normalizer + best[p]) * weight[p] : A(0);  // the loss from here on
      loss_sum += best[p];
      weight_sum += weight[p];
    }
    partial.loss_sum += loss_sum;
    partial.weight_sum += weight_sum;
    if (params.pixel_loss) std::copy_n(best, tile.count, at<A>(params.pixel_loss, tile.n, tile.y, tile.x));
    if (params.largest) std::copy_n(largest, tile.count, at<A>(params.largest, tile.n, tile.y, tile.x));
    if (params.log_normalizer) std::copy_n(log_sum, tile.count, at<A>(params.log_normalizer, tile.n, tile.y, tile.x));
    if (params.pixel_weight) std::copy_n(weight, tile.count, at<A>(params.pixel_weight, tile.n, tile.y, tile.x));
    if (!problem.grad) return;
    for (int p = 0; p < tile.count; ++p) sum[p] = weight[p] / sum[p];
    for (int64_t c = 0; c < classes; ++c) {
      const int32_t k = static_cast<int32_t>(c);
      const A* e = exponentials.data() + c * tile_width;
      SEGADV_SIMD
      for (int p = 0; p < tile.count; ++p) {
        const A softmax = e[p] * sum[p];
        const A g = y[p] == k ? softmax - weight[p] : softmax;
        tile.put(c, p, y[p] >= 0 ? g : A(0));
      }
    }
  });
  result = partial;
}

template <class Tiles>
SEGADV_CLONES void cross_entropy_backward_item(const CrossEntropyBackwardParams& params, Tiles& tiles, int64_t item,
                                               Partial& result) {
  using A = typename Tiles::A;
  const Problem& problem = params.problem;
  const int64_t classes = problem.logits.size[1];
  int32_t y[kMaxTile];
  A weight[kMaxTile];
  const A* class_weight = static_cast<const A*>(params.class_weight.data);
  Partial partial;
  tiles.walk(item, [&](const auto& tile) SEGADV_BODY {
    load_labels(problem, tile, y, &partial.bad);
    const A* grad_loss = at<A>(params.grad_loss, tile.n, tile.y, tile.x);
    const int64_t stride = params.grad_loss.stride[2];
    for (int p = 0; p < tile.count; ++p) weight[p] = grad_loss[p * stride];
    if (class_weight) {
      for (int p = 0; p < tile.count; ++p) weight[p] *= class_weight[y[p] >= 0 ? y[p] : 0];
    }
    if (params.pixel_weight) {
      const A* pixel_weight = at<A>(params.pixel_weight, tile.n, tile.y, tile.x);
      for (int p = 0; p < tile.count; ++p) weight[p] *= pixel_weight[p];
    }
    const A* largest = at<A>(params.largest, tile.n, tile.y, tile.x);
    const A* log_normalizer = at<A>(params.log_normalizer, tile.n, tile.y, tile.x);
    for (int64_t c = 0; c < classes; ++c) {
      const int32_t k = static_cast<int32_t>(c);
      tile.prefetch_after(c, classes);
      SEGADV_SIMD
      for (int p = 0; p < tile.count; ++p) {
        const A softmax = exp_nonpositive((tile.z(c, p) - largest[p]) - log_normalizer[p]);
        const A g = weight[p] * (y[p] == k ? softmax - A(1) : softmax);
        tile.put(c, p, y[p] >= 0 ? g : A(0));
      }
    }
  });
  result = partial;
}

}  // namespace

int64_t cross_entropy(const CrossEntropyParams& params) {
  int64_t bad = -1;
  dispatch_tiles(params.problem, {}, [&](auto& tiles) {
    using A = typename std::decay_t<decltype(tiles)>::A;
    std::vector<Partial> partial(tiles.items());
    parallel_for(tiles.items(), [&](int64_t item) { cross_entropy_item(params, tiles, item, partial[item]); });
    tiles.finish();
    sum_items<A>(params.loss_sum, partial, tiles.items_per_image(), &Partial::loss_sum);
    sum_items<A>(params.weight_sum, partial, tiles.items_per_image(), &Partial::weight_sum);
    sum_items<int64_t>(params.n_valid, partial, tiles.items_per_image(), &Partial::n_valid);
    bad = first_bad_label(partial);
  });
  return bad;
}

int64_t cross_entropy_backward(const CrossEntropyBackwardParams& params) {
  int64_t bad = -1;
  dispatch_tiles(params.problem, params.grad_loss, [&](auto& tiles) {
    std::vector<Partial> partial(tiles.items());
    parallel_for(tiles.items(), [&](int64_t item) {
      cross_entropy_backward_item(params, tiles, item, partial[item]);
    });
    tiles.finish();
    bad = first_bad_label(partial);
  });
  return bad;
}

}  // namespace segadv::cpu
