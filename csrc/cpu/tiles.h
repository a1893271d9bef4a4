// How a kernel walks over pixels whose logits have the labels' size: in tiles, each all classes of up to `tile`
// neighbouring pixels of a row, small enough for the cache. A kernel is a body that reads tile.z(class, pixel) and
// labels, and may write tile.put(class, pixel, gradient). float and double with neighbouring pixels are read in place;
// other types and layouts pass through a buffer of one tile. Resampled logits: up_tiles.h.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

#include "common/bilinear.h"
#include "common/dtype.h"
#include "common/layout.h"
#include "common/margin.h"
#include "cpu/parallel.h"
#include "cpu/simd.h"

namespace segadv::cpu {

constexpr int kMaxTile = 512;
constexpr int64_t kNoBadLabel = std::numeric_limits<int64_t>::max();

template <class A>
struct Tile {
  int64_t n, y, x;  // image, row, first column
  int count;        // pixels
  const A* logits;
  int64_t logits_stride;  // between classes
  A* grad;                // null where no gradient is wanted
  int64_t grad_stride;

  SEGADV_INLINE A z(int64_t c, int p) const { return logits[c * logits_stride + p]; }
  // Fetches what is read three classes later, in the next tile after the last class. The classes lie megabytes apart,
  // and the hardware's own prefetching has to start anew for each.
  SEGADV_INLINE void prefetch_after(int64_t c, int64_t classes) const {
    const int64_t ahead = c + 3;
    const A* next =
        ahead < classes ? logits + ahead * logits_stride : logits + (ahead - classes) * logits_stride + count;
    const char* line = reinterpret_cast<const char*>(next);
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(A)); i += 64) __builtin_prefetch(line + i);
  }
  // Gradient of class c: every class of every pixel exactly once.
  SEGADV_INLINE void put(int64_t c, int p, A g) const { grad[c * grad_stride + p] = g; }
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

// Pixels of which all classes take about 64 KiB: a multiple of 16 in [16, kMaxTile].
inline int tile_for(int64_t classes, size_t element) {
  const int64_t pixels = (64 << 10) / (classes * static_cast<int64_t>(element)) / 16 * 16;
  return static_cast<int>(std::clamp<int64_t>(pixels, 16, kMaxTile));
}

template <class S>
class FullTiles {
 public:
  using A = Compute<S>;

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
    tile_ = tile_for(logits.size[1], sizeof(A));
    stride_ = tile_ + 16;  // not a power of two, or the classes of a pixel would share few sets of the cache
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
    std::vector<A> in(copy_in ? classes * stride_ : 0), out(copy_out ? classes * stride_ : 0);
    const int64_t first = item % items_per_image_ * tiles_per_item_;
    const int64_t last = std::min(first + tiles_per_item_, tiles_);
    Tile<A> tile{};
    tile.n = item / items_per_image_;
    for (int64_t t = first; t < last; ++t) {
      tile.y = t / tiles_per_row_;
      tile.x = t % tiles_per_row_ * tile_;
      tile.count = static_cast<int>(std::min<int64_t>(tile_, columns_ - tile.x));
      if (copy_in) {
        load_block<S>(at<S>(logits, tile.n, 0, tile.y, tile.x), logits.stride[1], logits.stride[3], classes,
                      tile.count, in.data(), stride_);
        tile.logits = in.data();
        tile.logits_stride = stride_;
      } else if (logits) {
        tile.logits = at<A>(logits, tile.n, 0, tile.y, tile.x);
        tile.logits_stride = logits.stride[1];
      }
      if (copy_out) {
        tile.grad = out.data();
        tile.grad_stride = stride_;
      } else if (grad) {
        tile.grad = at<A>(grad, tile.n, 0, tile.y, tile.x);
        tile.grad_stride = grad.stride[1];
      }
      body(static_cast<const Tile<A>&>(tile));
      if (copy_out) {
        store_block<S>(out.data(), stride_, classes, tile.count, at<S>(grad, tile.n, 0, tile.y, tile.x),
                       grad.stride[1], grad.stride[3]);
      }
    }
  }

 private:
  const Problem& problem_;
  bool in_place_, grad_in_place_;
  int tile_, stride_;
  int64_t rows_, columns_, tiles_, tiles_per_row_, tiles_per_item_, items_per_image_;
};

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
