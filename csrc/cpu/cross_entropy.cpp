// Cross-entropy, SegPGD's and CosPGD's weighted forms of it, and their gradients.
//
// Fuses upsampling, log-softmax, label lookup, masking, the pixel weights, the sums per image and the gradient. The
// classes of a tile are read twice (maximum, then exponentials), from the cache the second time; where they are
// resampled, the maximum is looked for among few of them (up_tiles.h). Fewest bytes: the logits read once, the gradient
// written once, labels read once. Bound by the exponentials, one per class and pixel: at full resolution 2 to 3 times a
// copy of the logits into fresh memory (benchmarks/ops.py, floor).
#include <cstring>

#include "common/softmax.h"
#include "cpu/tiles.h"
#include "cpu/up_tiles.h"

namespace segadv::cpu {
namespace {

struct Partial {
  double loss_sum = 0, weight_sum = 0;
  int64_t n_valid = 0;
  int64_t bad = kNoBadLabel;
};

// The weights of the classes in an image, [C], or none.
template <class A>
SEGADV_INLINE const A* weights_in(const TensorView& class_weight, int64_t n) {
  return class_weight ? at<A>(class_weight, n, 0, 0) : nullptr;
}

// What is done once per pixel. `best` is the largest logit and becomes the loss; `own` is the label's logit. Where a
// pixel is not valid, all results are 0.
template <class A>
SEGADV_INLINE void finish_pixels(const CrossEntropyParams& params, const A* class_weight, int count, const int32_t* y,
                                 const int32_t* best_class, const A* own, const A* sum, const A* squares, A* best,
                                 A* shift, A* scale, A* weight) {
  for (int p = 0; p < count; ++p) {
    shift[p] = y[p] >= 0 ? best[p] : A(0);
    best[p] -= own[p];
  }
  if (params.loss == Loss::kSegPGD) {
    const SegPGDWeights<A> of(params.lambda, params.targeted);
    for (int p = 0; p < count; ++p) weight[p] = best_class[p] == y[p] ? of.correct : of.wrong;
  } else if (params.loss == Loss::kCosPGD) {
    for (int p = 0; p < count; ++p) weight[p] = cospgd_weight(-best[p], squares[p], params.targeted);
  } else {
    for (int p = 0; p < count; ++p) weight[p] = A(1);
  }
  if (class_weight) {
    for (int p = 0; p < count; ++p) weight[p] *= class_weight[y[p] >= 0 ? y[p] : 0];
  }
  for (int p = 0; p < count; ++p) {
    const bool valid = y[p] >= 0;
    weight[p] = valid ? weight[p] : A(0);
    const A loss = (log_of_sum(sum[p]) + best[p]) * weight[p];  // of every pixel: a branch would stop vectorisation
    best[p] = valid ? loss : A(0);
  }
  if (!params.scale && !params.problem.grad) return;
  for (int p = 0; p < count; ++p) scale[p] = y[p] >= 0 ? A(1) / sum[p] : A(0);
}

template <class S>
SEGADV_INLINE void cross_entropy_item(const CrossEntropyParams& params, FullTiles<S>& tiles, int64_t item,
                                      Partial& result) {
  using A = Compute<S>;
  const Problem& problem = params.problem;
  const int64_t classes = problem.logits.size[1];
  int32_t y[kMaxTile], best_class[kMaxTile];
  A best[kMaxTile], sum[kMaxTile], squares[kMaxTile], scale[kMaxTile], weight[kMaxTile], own[kMaxTile];
  A shift[kMaxTile];
  const int64_t tile_width = tiles.width();
  std::vector<A> exponentials(problem.grad ? classes * tile_width : 0);
  const bool cosine = params.loss == Loss::kCosPGD;
  Partial partial;
  tiles.walk(item, [&](const auto& tile) SEGADV_BODY {
    partial.n_valid += load_labels(problem, tile, y, &partial.bad);
    if (params.loss == Loss::kSegPGD) {
      find_best(tile, classes, best, best_class);
    } else {
      find_best(tile, classes, best);
    }
    for (int p = 0; p < tile.count; ++p) sum[p] = squares[p] = A(0);
    for (int64_t c = 0; c < classes; ++c) {
      A* store = problem.grad ? exponentials.data() + c * tile_width : own;  // `own` comes after
      if (cosine) {
        SEGADV_SIMD
        for (int p = 0; p < tile.count; ++p) {
          const A e = exp_nonpositive(tile.z(c, p) - best[p]);
          sum[p] += e;
          squares[p] += e * e;
          store[p] = e;
        }
      } else {
        SEGADV_SIMD
        for (int p = 0; p < tile.count; ++p) {
          const A e = exp_nonpositive(tile.z(c, p) - best[p]);
          sum[p] += e;
          store[p] = e;
        }
      }
    }
    for (int p = 0; p < tile.count; ++p) own[p] = tile.z(y[p] >= 0 ? y[p] : 0, p);
    finish_pixels(params, weights_in<A>(params.class_weight, tile.n), tile.count, y, best_class, own, sum, squares,
                  best, shift, scale, weight);
    partial.loss_sum += sum_of(best, tile.count);
    partial.weight_sum += sum_of(weight, tile.count);
    if (params.pixel_loss) std::copy_n(best, tile.count, at<A>(params.pixel_loss, tile.n, tile.y, tile.x));
    if (params.shift) std::copy_n(shift, tile.count, at<A>(params.shift, tile.n, tile.y, tile.x));
    if (params.scale) {
      std::copy_n(scale, tile.count, at<A>(params.scale, tile.n, tile.y, tile.x));
    }
    if (params.pixel_weight) std::copy_n(weight, tile.count, at<A>(params.pixel_weight, tile.n, tile.y, tile.x));
    if (!problem.grad) return;
    for (int p = 0; p < tile.count; ++p) scale[p] *= weight[p];
    for (int64_t c = 0; c < classes; ++c) {
      const int32_t k = static_cast<int32_t>(c);
      const A* e = exponentials.data() + c * tile_width;
      SEGADV_SIMD
      for (int p = 0; p < tile.count; ++p) {
        const A softmax = e[p] * scale[p];
        const A g = y[p] == k ? softmax - weight[p] : softmax;
        tile.put(c, p, y[p] >= 0 ? g : A(0));
      }
    }
  });
  result = partial;
}

// Sums of exp(z - best) over all classes, for some rows of a block, and of their squares where kSquares; `store`
// [C][kRows][kLanes] keeps them, where it is given.
template <bool kSquares, bool kStore, class T, class A>
SEGADV_INLINE void sum_exponentials(const T& tile, int r0, const Rows<A>& best, Rows<A>& sum, Rows<A>& squares,
                                    A* store) {
  Rows<A> total = {}, total_squares = {}, shift;  // copies, which the compiler keeps in registers
  std::memcpy(shift, best, sizeof(shift));
  const auto add_up = [&](auto rows) SEGADV_BODY {
    for (int i = 0; i < tile.listed; ++i) {
      const A *t0 = tile.t0.data() + i * kLanes, *t1 = tile.t1.data() + i * kLanes;
      for (int r = 0; r < rows; ++r) {
        const A w0 = tile.w0[r0 + r], w1 = tile.w1[r0 + r];
        A* to = kStore ? store + (i * kRows + r0 + r) * kLanes : nullptr;
        SEGADV_SIMD
        for (int p = 0; p < kLanes; ++p) {
          const A e = exp_nonpositive((w0 * t0[p] + w1 * t1[p]) - shift[r][p]);
          total[r][p] += e;
          if constexpr (kSquares) total_squares[r][p] += e * e;
          if constexpr (kStore) to[p] = e;
        }
      }
    }
  };
  if (r0 + kTogether <= tile.rows) {
    add_up(AllRows());
  } else {
    add_up(OneRow());
  }
  std::memcpy(sum, total, sizeof(total));
  std::memcpy(squares, total_squares, sizeof(total));
}

template <class S>
SEGADV_INLINE void cross_entropy_item(const CrossEntropyParams& params, UpTiles<S>& tiles, int64_t item,
                                      Partial& result) {
  using A = Compute<S>;
  const Problem& problem = params.problem;
  const int64_t classes = problem.logits.size[1];
  TileMap<int32_t> y;
  TileMap<A> loss, shift, scale, weight;
  // exp(z - largest logit) of a block, and what makes gradients of them
  std::vector<A> exponentials(problem.grad ? classes * kRows * kLanes : 0);
  A factor[kRows][kLanes];
  const bool cosine = params.loss == Loss::kCosPGD;
  Partial partial;
  tiles.walk(item, [&](auto& tile) SEGADV_BODY {
    partial.n_valid += load_labels(problem, tile, y, &partial.bad);
    const A* class_weight = weights_in<A>(params.class_weight, tile.n);
    double loss_sum[kLanes] = {}, weight_sum[kLanes] = {};
    for (int b = 0; b < tile.blocks(); ++b) {
      const int p0 = b * kLanes;
      Rows<A> best[kRows / kTogether], own[kRows / kTogether];
      Rows<int32_t> best_class[kRows / kTogether];
      tile.begin(b);
      tile.mark_labels(y);
      tile.list();
      for (int r0 = 0; r0 < tile.rows; r0 += kTogether) {
        const int i = r0 / kTogether;
        if (params.loss == Loss::kSegPGD) {
          find_best(LargestAndClass(), tile, r0, y, best[i], best_class[i], own[i]);
        } else {
          find_best(Largest(), tile, r0, y, best[i], best_class[i], own[i]);
        }
      }
      tile.list_all();
      for (int r0 = 0; r0 < tile.rows; r0 += kTogether) {
        const int i = r0 / kTogether;
        Rows<A> total, squares;
        if (cosine) {
          if (problem.grad) {
            sum_exponentials<true, true>(tile, r0, best[i], total, squares, exponentials.data());
          } else {
            sum_exponentials<true, false>(tile, r0, best[i], total, squares, exponentials.data());
          }
        } else if (problem.grad) {
          sum_exponentials<false, true>(tile, r0, best[i], total, squares, exponentials.data());
        } else {
          sum_exponentials<false, false>(tile, r0, best[i], total, squares, exponentials.data());
        }
        for (int j = 0; j < kTogether; ++j) {
          const int r = r0 + j;
          finish_pixels(params, class_weight, kLanes, y[r] + p0, best_class[i][j], own[i][j], total[j], squares[j],
                        best[i][j], shift[r] + p0, scale[r] + p0, weight[r] + p0);
          for (int p = 0; p < kLanes; ++p) {
            loss[r][p0 + p] = best[i][j][p];
            loss_sum[p] += best[i][j][p];
            weight_sum[p] += weight[r][p0 + p];
          }
          if (!problem.grad) continue;
          for (int p = 0; p < kLanes; ++p) factor[r][p] = weight[r][p0 + p] * scale[r][p0 + p];
        }
      }
      if (!problem.grad) continue;
      const auto add_gradient = [&](int32_t k, auto labelled, auto finite) SEGADV_BODY {
        A g0[kLanes] = {}, g1[kLanes] = {};
        for (int r = 0; r < tile.rows; ++r) {
          const int32_t* label = y[r] + p0;
          const A *e = exponentials.data() + (k * kRows + r) * kLanes, *pixel_weight = weight[r] + p0;
          const A w0 = tile.w0[r], w1 = tile.w1[r];
          SEGADV_SIMD
          for (int p = 0; p < kLanes; ++p) {
            A g = e[p] * factor[r][p];
            if (labelled) g -= select(label[p] == k, pixel_weight[p], A(0));
            if (!finite) g = select(label[p] >= 0, g, A(0));
            g0[p] += w0 * g;
            g1[p] += w1 * g;
          }
        }
        std::copy_n(g0, kLanes, tile.t0.data() + k * kLanes);
        std::copy_n(g1, kLanes, tile.t1.data() + k * kLanes);
      };
      for (int32_t k = 0; k < tile.listed; ++k) {
        if (!tile.finite) {
          add_gradient(k, std::true_type(), std::false_type());
        } else if (tile.has_label(k)) {
          add_gradient(k, std::true_type(), std::true_type());
        } else {
          add_gradient(k, std::false_type(), std::true_type());
        }
      }
      tile.add();
    }
    partial.loss_sum += sum_of(loss_sum, kLanes);
    partial.weight_sum += sum_of(weight_sum, kLanes);
    if (params.pixel_loss) store_map(params.pixel_loss, tile, loss);
    if (params.shift) store_map(params.shift, tile, shift);
    if (params.scale) store_map(params.scale, tile, scale);
    if (params.pixel_weight) store_map(params.pixel_weight, tile, weight);
  });
  result = partial;
}

template <class S>
SEGADV_INLINE void cross_entropy_backward_item(const CrossEntropyBackwardParams& params, FullTiles<S>& tiles,
                                               int64_t item, Partial& result) {
  using A = Compute<S>;
  const Problem& problem = params.problem;
  const int64_t classes = problem.logits.size[1];
  int32_t y[kMaxTile];
  A weight[kMaxTile], factor[kMaxTile];
  Partial partial;
  tiles.walk(item, [&](const auto& tile) SEGADV_BODY {
    load_labels(problem, tile, y, &partial.bad);
    const A* class_weight = weights_in<A>(params.class_weight, tile.n);
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
    const A* shift = at<A>(params.shift, tile.n, tile.y, tile.x);
    const A* scale = at<A>(params.scale, tile.n, tile.y, tile.x);
    for (int p = 0; p < tile.count; ++p) factor[p] = weight[p] * scale[p];
    for (int64_t c = 0; c < classes; ++c) {
      const int32_t k = static_cast<int32_t>(c);
      tile.prefetch_after(c, classes);
      SEGADV_SIMD
      for (int p = 0; p < tile.count; ++p) {
        const A softmax = exp_nonpositive(tile.z(c, p) - shift[p]) * factor[p];
        const A g = y[p] == k ? softmax - weight[p] : softmax;
        tile.put(c, p, y[p] >= 0 ? g : A(0));
      }
    }
  });
  result = partial;
}

template <class S>
SEGADV_INLINE void cross_entropy_backward_item(const CrossEntropyBackwardParams& params, UpTiles<S>& tiles,
                                               int64_t item, Partial& result) {
  using A = Compute<S>;
  const Problem& problem = params.problem;
  TileMap<int32_t> y;
  TileMap<A> weight, pixel_weight, shift, factor;
  Partial partial;
  tiles.walk(item, [&](auto& tile) SEGADV_BODY {
    load_labels(problem, tile, y, &partial.bad);
    const A* class_weight = weights_in<A>(params.class_weight, tile.n);
    load_map(params.grad_loss, tile, weight);
    load_map(params.shift, tile, shift);
    load_map(params.scale, tile, factor);
    if (params.pixel_weight) load_map(params.pixel_weight, tile, pixel_weight);
    for (int r = 0; r < tile.rows; ++r) {
      for (int p = 0; p < tile.count; ++p) {
        const A of_class = class_weight ? class_weight[y[r][p] >= 0 ? y[r][p] : 0] : A(1);
        weight[r][p] *= params.pixel_weight ? of_class * pixel_weight[r][p] : of_class;
        factor[r][p] *= weight[r][p];
      }
    }
    for (int b = 0; b < tile.blocks(); ++b) {
      tile.begin(b);
      const int p0 = tile.p0;
      tile.list_all();
      for (int i = 0; i < tile.listed; ++i) {
        const int32_t k = static_cast<int32_t>(i);
        A *t0 = tile.t0.data() + i * kLanes, *t1 = tile.t1.data() + i * kLanes;
        A g0[kLanes] = {}, g1[kLanes] = {};
        for (int r = 0; r < tile.rows; ++r) {
          const int32_t* label = y[r] + p0;
          const A w0 = tile.w0[r], w1 = tile.w1[r];
          SEGADV_SIMD
          for (int p = 0; p < kLanes; ++p) {
            const A z = w0 * t0[p] + w1 * t1[p];
            const A softmax = exp_nonpositive(z - shift[r][p0 + p]) * factor[r][p0 + p];
            const A g = softmax - select(label[p] == k, weight[r][p0 + p], A(0));
            const A valid = select(label[p] >= 0, g, A(0));
            g0[p] += w0 * valid;
            g1[p] += w1 * valid;
          }
        }
        std::copy_n(g0, kLanes, t0);
        std::copy_n(g1, kLanes, t1);
      }
      tile.add();
    }
  });
  result = partial;
}

}  // namespace

int64_t cross_entropy(const CrossEntropyParams& params) {
  int64_t bad = -1;
  dispatch_tiles(params.problem, {}, 1, [&](auto& tiles) {
    using A = typename std::decay_t<decltype(tiles)>::A;
    std::vector<Partial> partial(tiles.items());
    parallel_for(tiles.items(), [&](int64_t item) {
      on_this_cpu([&]() SEGADV_BODY { cross_entropy_item(params, tiles, item, partial[item]); });
    });
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
  dispatch_tiles(params.problem, params.grad_loss, 0, [&](auto& tiles) {
    std::vector<Partial> partial(tiles.items());
    parallel_for(tiles.items(), [&](int64_t item) {
      on_this_cpu([&]() SEGADV_BODY { cross_entropy_backward_item(params, tiles, item, partial[item]); });
    });
    tiles.finish();
    bad = first_bad_label(partial);
  });
  return bad;
}

}  // namespace segadv::cpu
