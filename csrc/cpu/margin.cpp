// Margin g = z_y - max over the other classes, its sum per image, and the gradient of that sum.
//
// Fuses upsampling, label lookup, masking, the maximum, the mean's sum and the gradient. Fewest bytes: the logits read
// once, the gradient written once (where wanted), labels read once. At full resolution bound by memory: 1.4 to 1.7
// times a copy of the logits into fresh memory (benchmarks/ops.py, floor). Resampled, bound by arithmetic: for 16
// pixels 11 vector operations, and 8 for the gradient, for each class that matters there (up_tiles.h), of 19 classes
// about four.
#include <cstring>
#include <limits>
#include <type_traits>

#include "cpu/tiles.h"
#include "cpu/up_tiles.h"

namespace segadv::cpu {
namespace {

struct Partial {
  double gain_sum = 0;
  int64_t n_valid = 0;
  int64_t bad = kNoBadLabel;
};

// At full resolution: label and runner-up of every pixel in a small type, -1 (all bits set) where it is not valid.
struct PixelClasses {
  PixelClasses(const Problem& problem, bool wanted) {
    if (!wanted) return;
    label.dtype = runner_up.dtype = problem.logits.size[1] <= 255 ? DType::kUInt8 : DType::kInt16;
    int64_t stride = 1;
    for (int d = 2; d >= 0; --d) {
      label.size[d] = runner_up.size[d] = problem.labels.size[d];
      label.stride[d] = runner_up.stride[d] = stride;
      stride *= problem.labels.size[d];
    }
    memory.resize(2 * stride * bytes_per_element(label.dtype));
    label.data = memory.data();
    runner_up.data = memory.data() + memory.size() / 2;
  }
  template <class T>
  SEGADV_INLINE void store(const T& tile, const int32_t* y, int32_t* runner) const {
    if (!label) return;
    for (int p = 0; p < tile.count; ++p) runner[p] = y[p] >= 0 ? runner[p] : -1;
    store_classes(label, tile, y);
    store_classes(runner_up, tile, runner);
  }
  std::vector<char> memory;
  TensorView label, runner_up;  // [N, H, W]
};

// At full resolution the gradient is written after everything else. From a tile it would go to as many places,
// megabytes apart, as there are classes, and in fresh memory every huge page would be cleared long before it is filled:
// 13 ms instead of 5 for 2 x 19 x 712 x 712; where a pixel's classes are neighbours (channels_last), a tile would have
// to be transposed. The price is PixelClasses.
bool writes_planes(const TensorView& grad) { return grad.stride[3] == 1 && grad.stride[2] == grad.size[3]; }
bool writes_pixels(const TensorView& grad) {
  return grad.stride[1] == 1 && grad.stride[3] == grad.size[1] && grad.stride[2] == grad.size[3] * grad.size[1];
}
bool writes_later(const Problem& problem) {
  const TensorView& grad = problem.grad;
  return grad && grad.size[2] == problem.labels.size[1] && grad.size[3] == problem.labels.size[2] &&
         (writes_planes(grad) || writes_pixels(grad));
}

template <class S, class M>
SEGADV_INLINE void write_plane(S* out, const M* label, const M* runner_up, M k, S plus, S minus, int64_t count) {
  const S zero{};
  SEGADV_SIMD
  for (int64_t i = 0; i < count; ++i) {
    const S other = runner_up[i] == k ? minus : zero;
    out[i] = label[i] == k ? plus : other;
  }
}

template <class S, class M>
void write_planes(const TensorView& grad, const PixelClasses& pixels, const std::vector<Compute<S>>& value) {
  using Bits = std::conditional_t<sizeof(S) == 2, uint16_t, S>;  // a struct of 16 bits would stop vectorisation
  constexpr int64_t kChunk = 1 << 18;
  const int64_t classes = grad.size[1], numel = grad.size[2] * grad.size[3], chunks = ceil_div(numel, kChunk);
  parallel_for_in_order(grad.size[0] * classes * chunks, [&](int64_t item) {
    const int64_t begin = item % chunks * kChunk, c = item / chunks % classes, n = item / chunks / classes;
    const Bits plus = bit_cast<Bits>(from_compute<S>(value[n])), minus = bit_cast<Bits>(from_compute<S>(-value[n]));
    on_this_cpu([&]() SEGADV_BODY {
      write_plane(at<Bits>(grad, n, c, 0) + begin, at<M>(pixels.label, n, 0, 0) + begin,
                  at<M>(pixels.runner_up, n, 0, 0) + begin, static_cast<M>(c), plus, minus,
                  std::min(kChunk, numel - begin));
    });
  });
}

template <class S, class M>
void write_pixels(const TensorView& grad, const PixelClasses& pixels, const std::vector<Compute<S>>& value) {
  const int64_t classes = grad.size[1], numel = grad.size[2] * grad.size[3];
  const int64_t chunk = tile_for(classes, sizeof(S)), chunks = ceil_div(numel, chunk);
  parallel_for_in_order(grad.size[0] * chunks, [&](int64_t item) {
    const int64_t begin = item % chunks * chunk, count = std::min(chunk, numel - begin), n = item / chunks;
    const M *label = at<M>(pixels.label, n, 0, 0) + begin, *runner_up = at<M>(pixels.runner_up, n, 0, 0) + begin;
    const S plus = from_compute<S>(value[n]), minus = from_compute<S>(-value[n]);
    S* out = at<S>(grad, n, 0, 0) + begin * classes;
    std::fill_n(out, count * classes, S{});
    for (int64_t i = 0; i < count; ++i, out += classes) {
      if (label[i] == static_cast<M>(-1)) continue;
      const auto runner = static_cast<std::make_unsigned_t<M>>(runner_up[i]);  // of a map that anyone may have made
      if (runner < classes) out[runner] = minus;
      out[label[i]] = plus;
    }
  });
}

// +value[n] at the label, -value[n] at the runner-up, 0 elsewhere.
template <class A>
void write_gradient(const TensorView& grad, const PixelClasses& pixels, const std::vector<A>& value) {
  advise_huge_pages(grad);
  dispatch_floating(grad.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    if constexpr (std::is_same_v<Compute<S>, A>) {
      const auto write = [&](auto small) {
        using M = decltype(small);
        writes_planes(grad) ? write_planes<S, M>(grad, pixels, value) : write_pixels<S, M>(grad, pixels, value);
      };
      pixels.label.dtype == DType::kUInt8 ? write(uint8_t()) : write(int16_t());
    }
  });
}

// +value at the label, -value at the runner-up, 0 elsewhere and at pixels that are not valid.
template <class T, class A>
SEGADV_INLINE void put_margin_gradient(const T& tile, int64_t classes, const int32_t* y, const int32_t* runner_up,
                                       const A* value) {
  for (int64_t c = 0; c < classes; ++c) {
    const int32_t k = static_cast<int32_t>(c);
    SEGADV_SIMD
    for (int p = 0; p < tile.count; ++p) {
      const A v = value[p];  // loaded always: a load under a condition would become a slow masked one
      const A other = runner_up[p] == k ? -v : A(0);
      tile.put(c, p, y[p] == k ? v : other);
    }
  }
}

// Lists the classes that get some of it in a tile's block.
template <class T>
SEGADV_INLINE void list_classes_with_gradient(T& tile, const TileMap<int32_t>& y, const TileMap<int32_t>& runner_up) {
  tile.unmark();
  for (int r = 0; r < tile.rows; ++r) {
    for (int p = tile.p0; p < tile.p0 + kLanes; ++p) tile.mark(y[r][p]), tile.mark(runner_up[r][p]);
  }
  tile.list_classes();
}

// The same for a tile's block: the listed classes get it. `value` is null where it is 1; y and runner_up are -1 where a
// pixel is not valid and behind the last row, up to a multiple of kTogether.
template <class T, class A>
SEGADV_INLINE void add_margin_gradient(T& tile, const TileMap<int32_t>& y, const TileMap<int32_t>& runner_up,
                                       const TileMap<A>* value) {
  const int p0 = tile.p0;
  for (int i = 0; i < tile.listed; ++i) {
    const int32_t k = tile.classes[i];
    A *g0 = tile.t0.data() + i * kLanes, *g1 = tile.t1.data() + i * kLanes;
    const auto add_rows = [&](int r0, auto first) SEGADV_BODY {
      SEGADV_SIMD
      for (int p = 0; p < kLanes; ++p) {
        A s0 = first ? A(0) : g0[p], s1 = first ? A(0) : g1[p];
        for (int r = r0; r < r0 + kTogether; ++r) {
          const A v = value ? (*value)[r][p0 + p] : A(1);
          const A g = select(y[r][p0 + p] == k, v, A(0)) - select(runner_up[r][p0 + p] == k, v, A(0));
          s0 += tile.w0[r] * g;
          s1 += tile.w1[r] * g;
        }
        g0[p] = s0;
        g1[p] = s1;
      }
    };
    add_rows(0, std::true_type());
    for (int r0 = kTogether; r0 < tile.rows; r0 += kTogether) add_rows(r0, std::false_type());
  }
  tile.add();
}

template <class S>
SEGADV_INLINE void margin_item(const MarginParams& params, const PixelClasses& pixels, FullTiles<S>& tiles,
                               int64_t item, Partial& result) {
  using A = Compute<S>;
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
      tile.prefetch_after(c, classes);
      SEGADV_SIMD
      for (int p = 0; p < tile.count; ++p) {
        const A z = tile.z(c, p), old = best[p];
        const int32_t old_class = runner_up[p];
        const bool takes = beats(z, old) & (y[p] != k);
        best[p] = takes ? z : old;
        runner_up[p] = select(takes, k, old_class);
      }
    }
    SEGADV_SIMD
    for (int p = 0; p < tile.count; ++p) {
      const bool valid = y[p] >= 0;
      const A margin = tile.z(valid ? y[p] : 0, p) - best[p];
      value[p] = valid ? margin : A(0);
      runner_up[p] = valid ? runner_up[p] : 0;
    }
    partial.gain_sum += sum_of(value, tile.count);
    if (params.margin) {
      A* out = at<A>(params.margin, tile.n, tile.y, tile.x);
      for (int p = 0; p < tile.count; ++p) out[p] = value[p];
    }
    if (params.runner_up) store_classes(params.runner_up, tile, runner_up);
    pixels.store(tile, y, runner_up);
    if (problem.grad) {
      for (int p = 0; p < tile.count; ++p) value[p] = y[p] >= 0 ? A(1) : A(0);
      put_margin_gradient(tile, classes, y, runner_up, value);
    }
  });
  result = partial;
}

template <class S>
SEGADV_INLINE void margin_item(const MarginParams& params, const PixelClasses&, UpTiles<S>& tiles, int64_t item,
                               Partial& result) {
  using A = Compute<S>;
  const Problem& problem = params.problem;
  TileMap<int32_t> y, runner_up;
  TileMap<A> margin;
  Partial partial;
  tiles.walk(item, [&](auto& tile) SEGADV_BODY {
    partial.n_valid += load_labels(problem, tile, y, &partial.bad);
    double sums[kLanes] = {};
    for (int b = 0; b < tile.blocks(); ++b) {
      tile.begin(b);
      const int p0 = tile.p0;
      tile.mark_labels(y);
      tile.list();
      for (int r0 = 0; r0 < tile.rows; r0 += kTogether) {
        Rows<A> best, own;
        Rows<int32_t> best_class;
        find_best(LargestOfOthers(), tile, r0, y, best, best_class, own);
        for (int r = 0; r < kTogether; ++r) {
          SEGADV_SIMD
          for (int p = 0; p < kLanes; ++p) {
            const bool valid = y[r0 + r][p0 + p] >= 0;
            const A value = valid ? own[r][p] - best[r][p] : A(0);
            sums[p] += value;
            margin[r0 + r][p0 + p] = value;
            runner_up[r0 + r][p0 + p] = valid ? best_class[r][p] : -1;
          }
        }
      }
      if (!problem.grad) continue;
      // To look for them costs as much as the gradient of a class or two.
      if (tile.listed > kLanes) list_classes_with_gradient(tile, y, runner_up);
      add_margin_gradient<decltype(tile), A>(tile, y, runner_up, nullptr);
    }
    partial.gain_sum += sum_of(sums, kLanes);
    if (params.margin) store_map(params.margin, tile, margin);
    if (params.runner_up) {
      for (int r = 0; r < tile.rows; ++r)
        for (int p = 0; p < kTile; ++p) runner_up[r][p] = std::max(runner_up[r][p], 0);
      store_classes(params.runner_up, tile, runner_up);
    }
  });
  result = partial;
}

template <class S>
SEGADV_INLINE void margin_backward_item(const MarginBackwardParams& params, const PixelClasses&, UpTiles<S>& tiles,
                                        int64_t item, Partial& result) {
  using A = Compute<S>;
  const Problem& problem = params.problem;
  TileMap<int32_t> y, runner_up;
  TileMap<A> value;
  Partial partial;
  tiles.walk(item, [&](auto& tile) SEGADV_BODY {
    load_labels(problem, tile, y, &partial.bad);
    load_classes(params.runner_up, tile, runner_up);
    load_map(params.grad_margin, tile, value);
    for (int b = 0; b < tile.blocks(); ++b) {
      tile.begin(b);
      for (int r = 0; r < tile.rows; ++r) {
        for (int p = tile.p0; p < tile.p0 + kLanes; ++p) {
          int32_t& runner = runner_up[r][p];
          if (y[r][p] < 0 || runner >= problem.logits.size[1]) runner = -1;
        }
      }
      list_classes_with_gradient(tile, y, runner_up);
      add_margin_gradient(tile, y, runner_up, &value);
    }
  });
  result = partial;
}

template <class S>
SEGADV_INLINE void margin_backward_item(const MarginBackwardParams& params, const PixelClasses& pixels,
                                        FullTiles<S>& tiles, int64_t item, Partial& result) {
  using A = Compute<S>;
  const Problem& problem = params.problem;
  const int64_t classes = problem.logits.size[1];
  int32_t y[kMaxTile], runner_up[kMaxTile];
  A value[kMaxTile];
  Partial partial;
  tiles.walk(item, [&](const auto& tile) SEGADV_BODY {
    load_labels(problem, tile, y, &partial.bad);
    load_classes(params.runner_up, tile, runner_up);
    pixels.store(tile, y, runner_up);
    if (!problem.grad) return;
    const A* grad_margin = at<A>(params.grad_margin, tile.n, tile.y, tile.x);
    const int64_t stride = params.grad_margin.stride[2];
    for (int p = 0; p < tile.count; ++p) value[p] = y[p] >= 0 ? grad_margin[p * stride] : A(0);
    put_margin_gradient(tile, classes, y, runner_up, value);
  });
  result = partial;
}

}  // namespace

int64_t margin(const MarginParams& given) {
  int64_t bad = -1;
  MarginParams params = given;
  const bool later = writes_later(given.problem);
  const PixelClasses pixels(given.problem, later);
  if (later) params.problem.grad = {};
  dispatch_tiles(params.problem, {}, 2, [&](auto& tiles) {
    using A = typename std::decay_t<decltype(tiles)>::A;
    std::vector<Partial> partial(tiles.items());
    parallel_for(tiles.items(), [&](int64_t item) {
      on_this_cpu([&]() SEGADV_BODY { margin_item(params, pixels, tiles, item, partial[item]); });
    });
    tiles.finish();
    if (later) write_gradient(given.problem.grad, pixels, std::vector<A>(params.problem.logits.size[0], A(1)));
    sum_items<A>(params.gain_sum, partial, tiles.items_per_image(), &Partial::gain_sum);
    sum_items<int64_t>(params.n_valid, partial, tiles.items_per_image(), &Partial::n_valid);
    bad = first_bad_label(partial);
  });
  return bad;
}

int64_t margin_backward(const MarginBackwardParams& given) {
  int64_t bad = -1;
  MarginBackwardParams params = given;
  const TensorView& grad_margin = given.grad_margin;
  const bool per_image = grad_margin.stride[1] == 0 && grad_margin.stride[2] == 0;
  const bool later = per_image && writes_later(given.problem);
  const PixelClasses pixels(given.problem, later);
  if (later) params.problem.grad = {};
  dispatch_tiles(params.problem, grad_margin, 0, [&](auto& tiles) {
    using A = typename std::decay_t<decltype(tiles)>::A;
    std::vector<Partial> partial(tiles.items());
    parallel_for(tiles.items(), [&](int64_t item) {
      on_this_cpu([&]() SEGADV_BODY { margin_backward_item(params, pixels, tiles, item, partial[item]); });
    });
    tiles.finish();
    if (later) {
      std::vector<A> value(params.problem.logits.size[0]);
      for (size_t n = 0; n < value.size(); ++n) value[n] = *at<A>(grad_margin, n, 0, 0);
      write_gradient(given.problem.grad, pixels, value);
    }
    bad = first_bad_label(partial);
  });
  return bad;
}

}  // namespace segadv::cpu
