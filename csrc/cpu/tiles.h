// How a kernel walks over the pixels: in tiles, each all classes of up to `tile` neighbouring pixels of a row at the
// labels' size, small enough for the cache. A kernel is a body that reads tile.z(class, pixel) and labels, and may
// write tile.put(class, pixel, gradient). Two walks offer the same tiles:
//
// * FullTiles: the logits have the labels' size. float and double with neighbouring pixels are read in place;
//   other types and layouts pass through a buffer of one tile.
// * UpTiles: the logits are resampled on the fly. Output pixels that share their top-left tap form a quad. For a
//   row of quads and a tile of columns, both rows of logits are resampled along x once (t0, t1); an output row is
//   then w0 * t0 + w1 * t1. The gradient goes the same way back: g0 += w0 * g and g1 += w1 * g over the output rows
//   of the quads, then once along x into two rows of low-resolution sums. Nothing larger than two rows is kept.
//   A band of quad rows is one item; the rows that two bands share are added at the end, in a fixed order.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/bilinear.h"
#include "common/dtype.h"
#include "common/margin.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace segadv::cpu {

constexpr int kMaxTile = 512;
constexpr int64_t kNoBadLabel = std::numeric_limits<int64_t>::max();

template <class S, bool kUp>
struct Tile {
  using A = Compute<S>;
  int64_t n, y, x;  // image, output row, first output column
  int count;        // pixels
  const A* z0;
  const A* z1;
  int64_t z_stride;  // between classes
  A* g0;             // null where no gradient is wanted
  A* g1;
  int64_t g_stride;
  A w0, w1;  // weights of the two rows

  SEGADV_INLINE A z(int64_t c, int p) const {
    if constexpr (kUp) {
      return w0 * z0[c * z_stride + p] + w1 * z1[c * z_stride + p];
    } else {
      return z0[c * z_stride + p];
    }
  }
  // Fetches what is read three classes later, in the next tile after the last class. At full resolution the classes
  // lie megabytes apart, and the hardware's own prefetching has to start anew for each.
  SEGADV_INLINE void prefetch_after(int64_t c, int64_t classes) const {
    if constexpr (!kUp) {
      const int64_t ahead = c + 3;
      const A* next = ahead < classes ? z0 + ahead * z_stride : z0 + (ahead - classes) * z_stride + count;
      const char* line = reinterpret_cast<const char*>(next);
      for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(A)); i += 64) __builtin_prefetch(line + i);
    }
  }
  // Gradient of class c: every class of every pixel exactly once.
  SEGADV_INLINE void put(int64_t c, int p, A g) const {
    if constexpr (kUp) {
      g0[c * g_stride + p] += w0 * g;
      g1[c * g_stride + p] += w1 * g;
    } else {
      g0[c * g_stride + p] = g;
    }
  }
};

// The largest logit of each pixel, and its class by the tie rule where `best_class` is given.
template <class T, class A>
SEGADV_INLINE void find_best(const T& tile, int64_t classes, A* best, int32_t* best_class) {
  for (int p = 0; p < tile.count; ++p) best[p] = tile.z(0, p);
  for (int p = 0; p < tile.count; ++p) best_class[p] = 0;
  for (int64_t c = 1; c < classes; ++c) {
    const int32_t k = static_cast<int32_t>(c);
    tile.prefetch_after(c, classes);
    SEGADV_SIMD
    for (int p = 0; p < tile.count; ++p) {
      const A z = tile.z(c, p), old = best[p];
      const int32_t old_class = best_class[p];
      const bool takes = beats(z, old);
      best[p] = takes ? z : old;
      best_class[p] = select(takes, k, old_class);
    }
  }
}
template <class T, class A>
SEGADV_INLINE void find_best(const T& tile, int64_t classes, A* best) {
  for (int p = 0; p < tile.count; ++p) best[p] = tile.z(0, p);
  for (int64_t c = 1; c < classes; ++c) {
    tile.prefetch_after(c, classes);
    SEGADV_SIMD
    for (int p = 0; p < tile.count; ++p) {
      const A z = tile.z(c, p), old = best[p];
      best[p] = beats(z, old) ? z : old;
    }
  }
}

template <class T>
SEGADV_INLINE T* at(const TensorView& view, int64_t i0, int64_t i1, int64_t i2, int64_t i3 = 0) {
  return static_cast<T*>(view.data) + i0 * view.stride[0] + i1 * view.stride[1] + i2 * view.stride[2] +
         i3 * view.stride[3];
}

// --- tiles.cpp: once per tile, so a call does not matter; compiled once instead of into every kernel ---

// Labels of `count` pixels as int32, -1 where the pixel is not valid. Returns the number of valid pixels; first_bad
// becomes the flat position of the first label that is neither a class nor ignored, if that is lower.
int load_labels(const Problem& problem, int64_t n, int64_t row, int64_t column, int count, int32_t* y,
                int64_t* first_bad);

// A class index per pixel (runner-up, prediction) in its own small type.
void store_classes(const TensorView& map, int64_t n, int64_t row, int64_t column, int count, const int32_t* classes);
void load_classes(const TensorView& map, int64_t n, int64_t row, int64_t column, int count, int32_t* classes);

// Copies [classes][pixels] between a strided tensor and a dense buffer of the compute type.
template <class S>
void load_block(const S* from, int64_t class_stride, int64_t pixel_stride, int64_t classes, int64_t count,
                Compute<S>* to, int64_t to_stride);
template <class S>
void store_block(const Compute<S>* from, int64_t from_stride, int64_t classes, int64_t count, S* to,
                 int64_t class_stride, int64_t pixel_stride);

// Resampling along x of all classes, for the output columns of a tile: x0, x1 and weight (of x1) are theirs.
template <class A>
struct Columns {
  const int32_t* x0;
  const int32_t* x1;
  const A* weight;
  int count;
};
template <class A>
void expand(const A* row, int64_t width, int64_t classes, const Columns<A>& columns, A* to, int64_t to_stride);
// Its transpose, added to a row of sums; neighbours that share their taps are added up first.
template <class A>
void contract(const A* from, int64_t from_stride, int64_t classes, const Columns<A>& columns, A* row, int64_t width);

template <class T>
SEGADV_INLINE int load_labels(const Problem& problem, const T& tile, int32_t* y, int64_t* first_bad) {
  return load_labels(problem, tile.n, tile.y, tile.x, tile.count, y, first_bad);
}
template <class T>
SEGADV_INLINE void store_classes(const TensorView& map, const T& tile, const int32_t* classes) {
  store_classes(map, tile.n, tile.y, tile.x, tile.count, classes);
}
template <class T>
SEGADV_INLINE void load_classes(const TensorView& map, const T& tile, int32_t* classes) {
  load_classes(map, tile.n, tile.y, tile.x, tile.count, classes);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Pixels whose `arrays` blocks of all classes take about `bytes`: a multiple of 16 in [16, kMaxTile].
inline int tile_for(int64_t bytes, int64_t arrays, int64_t classes, size_t element) {
  const int64_t pixels = bytes / (arrays * classes * static_cast<int64_t>(element)) / 16 * 16;
  return static_cast<int>(std::clamp<int64_t>(pixels, 16, kMaxTile));
}

// Whether rows follow each other without a gap, so that an image is one long row.
inline bool rows_join(const TensorView& view, int row_dim) {
  return !view || view.stride[row_dim] == view.stride[row_dim + 1] * view.size[row_dim + 1];
}

template <class S>
class FullTiles {
 public:
  using A = Compute<S>;
  static constexpr bool kUp = false;

  // `map`: a further input [N, H, W] of any strides that the body reads, or none.
  FullTiles(const Problem& problem, const TensorView& map = {}) : problem_(problem) {
    const TensorView &logits = problem.logits, &labels = problem.labels, &grad = problem.grad;
    in_place_ = std::is_same_v<S, A> && logits.stride[3] == 1;
    grad_in_place_ = std::is_same_v<S, A> && grad.stride[3] == 1;
    rows_ = labels.size[1], columns_ = labels.size[2];
    if (rows_join(logits, 2) && rows_join(labels, 1) && rows_join(grad, 2) && rows_join(map, 1)) {
      columns_ *= rows_;
      rows_ = 1;
    }
    tile_ = tile_for(64 << 10, 1, logits.size[1], sizeof(A));
    tiles_per_row_ = ceil_div(columns_, tile_);
    const int64_t tiles = rows_ * tiles_per_row_;
    tiles_per_item_ = std::max<int64_t>(1, (32 << 10) / tile_);
    items_per_image_ = ceil_div(tiles, tiles_per_item_);
    tiles_ = tiles;
    advise_huge_pages(grad);
  }
  int64_t items() const { return problem_.logits.size[0] * items_per_image_; }
  int64_t items_per_image() const { return items_per_image_; }
  int width() const { return tile_; }  // most pixels of a tile
  void finish() const {}

  template <class Body>
  SEGADV_INLINE void walk(int64_t item, Body&& body) const {
    const TensorView &logits = problem_.logits, &grad = problem_.grad;
    const int64_t classes = logits.size[1];
    const bool copy_in = logits && !in_place_, copy_out = grad && !grad_in_place_;
    std::vector<A> in(copy_in ? classes * tile_ : 0), out(copy_out ? classes * tile_ : 0);
    const int64_t first = item % items_per_image_ * tiles_per_item_;
    const int64_t last = std::min(first + tiles_per_item_, tiles_);
    Tile<S, false> tile{};
    tile.n = item / items_per_image_;
    tile.w0 = 1;
    for (int64_t t = first; t < last; ++t) {
      tile.y = t / tiles_per_row_;
      tile.x = t % tiles_per_row_ * tile_;
      tile.count = static_cast<int>(std::min<int64_t>(tile_, columns_ - tile.x));
      if (copy_in) {
        load_block<S>(at<S>(logits, tile.n, 0, tile.y, tile.x), logits.stride[1], logits.stride[3], classes,
                      tile.count, in.data(), tile_);
        tile.z0 = in.data();
        tile.z_stride = tile_;
      } else if (logits) {
        tile.z0 = at<A>(logits, tile.n, 0, tile.y, tile.x);
        tile.z_stride = logits.stride[1];
      }
      if (copy_out) {
        tile.g0 = out.data();
        tile.g_stride = tile_;
      } else if (grad) {
        tile.g0 = at<A>(grad, tile.n, 0, tile.y, tile.x);
        tile.g_stride = grad.stride[1];
      }
      body(static_cast<const Tile<S, false>&>(tile));
      if (copy_out) {
        store_block<S>(out.data(), tile_, classes, tile.count, at<S>(grad, tile.n, 0, tile.y, tile.x),
                       grad.stride[1], grad.stride[3]);
      }
    }
  }

 private:
  const Problem& problem_;
  bool in_place_, grad_in_place_;
  int tile_;
  int64_t rows_, columns_, tiles_, tiles_per_row_, tiles_per_item_, items_per_image_;
};

template <class S>
class UpTiles {
 public:
  using A = Compute<S>;
  static constexpr bool kUp = true;

  UpTiles(const Problem& problem, const TensorView& = {}) : problem_(problem) {
    const int64_t N = problem.logits.size[0], C = problem.logits.size[1];
    h_ = problem.logits.size[2], w_ = problem.logits.size[3];
    H_ = problem.labels.size[1], W_ = problem.labels.size[2];
    tile_ = tile_for(24 << 10, 5, C, sizeof(A));
    bands_ = ceil_div(h_, kBand);
    first_row_.assign(h_ + 1, H_);
    weight_y_.resize(H_);
    for (int64_t y = H_ - 1; y >= 0; --y) {
      const Tap tap = bilinear_tap(y, h_, H_, problem.align_corners);
      first_row_[tap.i0] = y;
      weight_y_[y] = static_cast<A>(tap.w1);
    }
    for (int64_t q = h_ - 1; q >= 0; --q) first_row_[q] = std::min(first_row_[q], first_row_[q + 1]);
    x0_.resize(W_), x1_.resize(W_), weight_x_.resize(W_);
    for (int64_t x = 0; x < W_; ++x) {
      const Tap tap = bilinear_tap(x, w_, W_, problem.align_corners);
      x0_[x] = static_cast<int32_t>(tap.i0);
      x1_[x] = static_cast<int32_t>(tap.i1);
      weight_x_[x] = static_cast<A>(tap.w1);
    }
    if (problem.grad) shared_rows_.resize(2 * N * bands_ * C * w_);
  }
  int64_t items() const { return problem_.logits.size[0] * bands_; }
  int64_t items_per_image() const { return bands_; }
  int width() const { return tile_; }

  template <class Body>
  SEGADV_INLINE void walk(int64_t item, Body&& body) {
    const TensorView &logits = problem_.logits, &grad = problem_.grad;
    const int64_t C = logits.size[1], row = C * w_, block = C * tile_;
    std::vector<A> rows(logits ? 2 * row : 0), sums(grad ? 2 * row : 0);
    std::vector<A> t(logits ? 2 * block : 0), g(grad ? 2 * block : 0);
    A *upper = rows.data(), *lower = rows.data() + (logits ? row : 0);
    A *sum0 = sums.data(), *sum1 = sums.data() + (grad ? row : 0);
    Tile<S, true> tile{};
    tile.n = item / bands_;
    tile.z0 = t.data(), tile.z1 = t.data() + (logits ? block : 0);
    tile.g0 = g.data(), tile.g1 = g.data() + (grad ? block : 0);
    tile.z_stride = tile.g_stride = tile_;
    const int64_t q_begin = item % bands_ * kBand, q_end = std::min(q_begin + kBand, h_);
    if (logits) load_row(tile.n, q_begin, lower);
    for (int64_t q = q_begin; q < q_end; ++q) {
      if (logits) {
        std::swap(upper, lower);
        load_row(tile.n, std::min(q + 1, h_ - 1), lower);
      }
      const int64_t y_begin = first_row_[q], y_end = first_row_[q + 1];
      for (int64_t x = 0; x < W_ && y_begin < y_end; x += tile_) {
        tile.x = x;
        tile.count = static_cast<int>(std::min<int64_t>(tile_, W_ - x));
        if (logits) {
          expand(upper, w_, C, columns(tile), t.data(), tile_);
          expand(lower, w_, C, columns(tile), t.data() + block, tile_);
        }
        std::fill(g.begin(), g.end(), A(0));
        for (int64_t y = y_begin; y < y_end; ++y) {
          tile.y = y;
          tile.w1 = weight_y_[y];
          tile.w0 = A(1) - tile.w1;
          body(static_cast<const Tile<S, true>&>(tile));
        }
        if (grad) {
          contract(g.data(), tile_, C, columns(tile), sum0, w_);
          contract(g.data() + block, tile_, C, columns(tile), sum1, w_);
        }
      }
      if (!grad) continue;
      if (q == h_ - 1) {  // the row below the last one is the last one itself
        for (int64_t i = 0; i < row; ++i) sum0[i] += sum1[i];
      }
      if (q == q_begin) {
        std::copy(sum0, sum0 + row, shared_row(item, 0));
      } else {
        store_row(tile.n, q, sum0);
      }
      std::swap(sum0, sum1);
      std::fill(sum1, sum1 + row, A(0));
    }
    if (grad) std::copy(sum0, sum0 + row, shared_row(item, 1));
  }

  // The first row of every band: its own sums and what the band above left for it.
  void finish() {
    if (!problem_.grad) return;
    const int64_t row = problem_.logits.size[1] * w_;
    for (int64_t item = 0; item < items(); ++item) {
      A* sum = shared_row(item, 0);
      if (item % bands_ != 0) {
        const A* above = shared_row(item - 1, 1);
        for (int64_t i = 0; i < row; ++i) sum[i] += above[i];
      }
      store_row(item / bands_, item % bands_ * kBand, sum);
    }
  }

 private:
  static constexpr int64_t kBand = 4;  // rows of quads in an item

  A* shared_row(int64_t item, int which) {
    return shared_rows_.data() + (2 * item + which) * problem_.logits.size[1] * w_;
  }
  void load_row(int64_t n, int64_t y, A* row) const {
    const TensorView& logits = problem_.logits;
    load_block<S>(at<S>(logits, n, 0, y, 0), logits.stride[1], logits.stride[3], logits.size[1], w_, row, w_);
  }
  void store_row(int64_t n, int64_t y, const A* row) const {
    const TensorView& grad = problem_.grad;
    store_block<S>(row, w_, grad.size[1], w_, at<S>(grad, n, 0, y, 0), grad.stride[1], grad.stride[3]);
  }
  SEGADV_INLINE Columns<A> columns(const Tile<S, true>& tile) const {
    return {x0_.data() + tile.x, x1_.data() + tile.x, weight_x_.data() + tile.x, tile.count};
  }

  const Problem& problem_;
  int tile_;
  int64_t h_, w_, H_, W_, bands_;
  std::vector<int64_t> first_row_;      // [h + 1]: first output row whose upper tap is q or below
  std::vector<A> weight_y_, weight_x_;  // of the lower and of the right tap
  std::vector<int32_t> x0_, x1_;
  std::vector<A> shared_rows_;  // [items][2][C][w]: a band's first row, and its share of the row below it
};

// Calls f(tiles) with the walk that fits the problem and its storage type.
template <class F>
void dispatch_tiles(const Problem& problem, const TensorView& map, F&& f) {
  dispatch_floating(problem.logits.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const bool same = problem.logits.size[2] == problem.labels.size[1] && problem.logits.size[3] == problem.labels.size[2];
    if (same) {
      FullTiles<S> tiles(problem, map);
      f(tiles);
    } else {
      UpTiles<S> tiles(problem, map);
      f(tiles);
    }
  });
}

// Sums the slots of each image's items, in order.
template <class T, class Partial, class Member>
void sum_items(const TensorView& to, const std::vector<Partial>& partial, int64_t items_per_image, Member member) {
  if (!to) return;
  for (int64_t n = 0; n < to.size[0]; ++n) {
    auto sum = partial.empty() ? decltype(Partial{}.*member){} : partial[0].*member;
    sum = 0;
    for (int64_t i = 0; i < items_per_image; ++i) sum += partial[n * items_per_image + i].*member;
    static_cast<T*>(to.data)[n] = static_cast<T>(sum);
  }
}

template <class Partial>
int64_t first_bad_label(const std::vector<Partial>& partial) {
  int64_t first = kNoBadLabel;
  for (const Partial& p : partial) first = std::min(first, p.bad);
  return first == kNoBadLabel ? -1 : first;
}

}  // namespace segadv::cpu
