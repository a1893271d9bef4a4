// Margin g = z_y - max over the other classes, its sum per image, and the gradient of that sum.
//
// Fuses upsampling, label lookup, masking, the maximum, the mean's sum and the gradient. Fewest bytes: the logits read
// once, the gradient written once (where wanted), labels read once; bound by memory at full resolution.
#include "common/margin.h"

#include <limits>

#include "cpu/tiles.h"

namespace segadv::cpu {
namespace {

struct Partial {
  double gain_sum = 0;
  int64_t n_valid = 0;
  int64_t bad = kNoBadLabel;
};

// +value at the label, -value at the runner-up, 0 elsewhere and at pixels that are not valid.
template <class T, class A>
SEGADV_INLINE void put_margin_gradient(const T& tile, int64_t classes, const int32_t* y, const int32_t* runner_up,
                                       const A* value) {
  if constexpr (std::is_same_v<T, Tile<double, true>> || std::is_same_v<T, Tile<float, true>> ||
                std::is_same_v<T, Tile<Half, true>> || std::is_same_v<T, Tile<BFloat16, true>>) {
    // Sums: only two classes of a pixel take part.
    for (int p = 0; p < tile.count; ++p) {
      if (y[p] < 0) continue;
      tile.put(y[p], p, value[p]);
      tile.put(runner_up[p], p, -value[p]);
    }
  } else {
    for (int64_t c = 0; c < classes; ++c) {
      const int32_t k = static_cast<int32_t>(c);
      SEGADV_SIMD
      for (int p = 0; p < tile.count; ++p) {
        const A other = runner_up[p] == k ? -value[p] : A(0);
        tile.put(c, p, y[p] == k ? value[p] : other);
      }
    }
  }
}

template <class Tiles>
SEGADV_CLONES void margin_item(const MarginParams& params, Tiles& tiles, int64_t item, Partial& result) {
  using A = typename Tiles::A;
  const Problem& problem = params.problem;
  const int64_t classes = problem.logits.size[1];
  int32_t y[kMaxTile], runner_up[kMaxTile];
  A best[kMaxTile], value[kMaxTile];
  Partial partial;
  tiles.walk(item, [&](const auto& tile) SEGADV_BODY {
    partial.n_valid += load_labels(problem, tile, y, &partial.bad);
    SEGADV_SIMD
    for (int p = 0; p < tile.count; ++p) {
      best[p] = -std::numeric_limits<A>::infinity();
      runner_up[p] = lowest_other_class(y[p]);
    }
    for (int64_t c = 0; c < classes; ++c) {
      const int32_t k = static_cast<int32_t>(c);
      SEGADV_SIMD
      for (int p = 0; p < tile.count; ++p) {
        const A z = tile.z(c, p);
        const bool takes = beats(z, best[p]) & (y[p] != k);
        best[p] = takes ? z : best[p];
        runner_up[p] = takes ? k : runner_up[p];
      }
    }
    A sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int p = 0; p < tile.count; ++p) {
      const bool valid = y[p] >= 0;
      const A margin = tile.z(valid ? y[p] : 0, p) - best[p];
      value[p] = valid ? margin : A(0);
      runner_up[p] = valid ? runner_up[p] : 0;
      sum += value[p];
    }
    partial.gain_sum += sum;
    if (params.margin) {
      A* out = at<A>(params.margin, tile.n, tile.y, tile.x);
      for (int p = 0; p < tile.count; ++p) out[p] = value[p];
    }
    if (params.runner_up) store_classes(params.runner_up, tile, runner_up);
    if (problem.grad) {
      for (int p = 0; p < tile.count; ++p) value[p] = y[p] >= 0 ? A(1) : A(0);
      put_margin_gradient(tile, classes, y, runner_up, value);
    }
  });
  result = partial;
}

template <class Tiles>
SEGADV_CLONES void margin_backward_item(const MarginBackwardParams& params, Tiles& tiles, int64_t item,
                                        Partial& result) {
  using A = typename Tiles::A;
  const Problem& problem = params.problem;
  const int64_t classes = problem.logits.size[1];
  int32_t y[kMaxTile], runner_up[kMaxTile];
  A value[kMaxTile];
  Partial partial;
  tiles.walk(item, [&](const auto& tile) SEGADV_BODY {
    load_labels(problem, tile, y, &partial.bad);
    load_classes(params.runner_up, tile, runner_up);
    const A* grad_margin = at<A>(params.grad_margin, tile.n, tile.y, tile.x);
    const int64_t stride = params.grad_margin.stride[2];
    for (int p = 0; p < tile.count; ++p) value[p] = y[p] >= 0 ? grad_margin[p * stride] : A(0);
    put_margin_gradient(tile, classes, y, runner_up, value);
  });
  result = partial;
}

}  // namespace

int64_t margin(const MarginParams& params) {
  int64_t bad = -1;
  dispatch_tiles(params.problem, {}, [&](auto& tiles) {
    using A = typename std::decay_t<decltype(tiles)>::A;
    std::vector<Partial> partial(tiles.items());
    parallel_for(tiles.items(), [&](int64_t item) { margin_item(params, tiles, item, partial[item]); });
    tiles.finish();
    sum_items<A>(params.gain_sum, partial, tiles.items_per_image(), &Partial::gain_sum);
    sum_items<int64_t>(params.n_valid, partial, tiles.items_per_image(), &Partial::n_valid);
    bad = first_bad_label(partial);
  });
  return bad;
}

int64_t margin_backward(const MarginBackwardParams& params) {
  int64_t bad = -1;
  dispatch_tiles(params.problem, params.grad_margin, [&](auto& tiles) {
    std::vector<Partial> partial(tiles.items());
    parallel_for(tiles.items(), [&](int64_t item) { margin_backward_item(params, tiles, item, partial[item]); });
    tiles.finish();
    bad = first_bad_label(partial);
  });
  return bad;
}

}  // namespace segadv::cpu
