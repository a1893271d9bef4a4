// How a kernel walks over pixels whose logits are resampled on the fly. Rows of pixels that share their two rows of
// logits are taken together, in tiles of kTile columns; a tile is cut into blocks of kLanes columns. Those of a block's
// classes that matter are listed and resampled along x once (t0 and t1: both rows of logits); a row of pixels is then
// w0 * t0 + w1 * t1. The gradient goes the same way back: w0 * g and w1 * g, summed over the rows of a block, take the
// place of t0 and t1, and go once along x into two rows of low-resolution sums. A band of rows of logits is one item;
// the rows that two bands share are added at the end, in a fixed order. Nothing of the labels' size is kept: some rows
// of logits for each thread and, for the gradient, two rows for every kBand of the logits'.
//
// Which classes matter: resampling is a mean whose weights are not negative, and rounding keeps the order of numbers.
// So a class that lies below another one at both taps of both rows lies nowhere above it in between, and a class below
// two others is neither the largest nor, whatever the label, the runner-up. `mark_rivals` looks for them once for all
// pixels between four logits. With the labels' classes, 3.8 of 19 remain in a block where the margin of the demo's
// trained networks is looked for, and 2.1 where their prediction is; of random numbers all. (Rounding can make a class
// equal to one that it lies below; then the larger one at the taps counts as the larger one, not the lower index.)
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "common/bilinear.h"
#include "cpu/tiles.h"

namespace segadv::cpu {

constexpr int kLanes = 16;         // columns of a block
constexpr int kRows = 8;           // most rows of a tile
constexpr int kTile = 8 * kLanes;  // most columns of a tile
constexpr int kTogether = 2;       // rows of a block whose running maxima are in registers
constexpr int kGroup = 8;          // columns of logits whose gradients are summed at once

template <class T>
using TileMap = T[kRows][kTile];

// How many of a block's columns of logits are resampled at once: all where logits become four times as many or more.
constexpr int taps_at_once(int columns) { return columns <= 4 ? 4 : 6; }

// --- tiles.cpp ---

// mark[c * columns + x] = whether class c matters between the columns x and x + 1 of two rows of logits: 0 only where
// it is finite and lies below `rivals` (1 or 2) other classes at all four. Rows are [classes][stride] with at least one
// element behind the last of `columns`, which is a multiple of kLanes.
template <class A>
void mark_rivals(const A* upper, const A* lower, int64_t stride, int64_t columns, int64_t classes, int rivals,
                 uint8_t* mark);

template <class A>
bool all_finite(const A* values, int64_t count);

// Resampling along x of some classes of two rows [C][stride]: t[i][p] is the sum of weight[j][p] * row[classes[i]][j]
// over j. Functions of their own, as is the next: inside a kernel they lack registers.
template <class A>
void expand_classes(const A* upper, const A* lower, int64_t stride, const int32_t* classes, int count,
                    const A* weight, int columns, A* t0, A* t1);

// The way back: row[classes[i]][j] += sum of weight[j][p] * g[i][p] over p, from i = first on. Stops at a class whose
// sums are not finite, without adding them, and returns its i, or count.
template <class A>
int add_classes(const A* g0, const A* g1, const int32_t* classes, int first, int count, const A* weight, int columns,
                A* upper, A* lower, int64_t stride);

// ---

template <class S>
class UpTiles {
 public:
  using A = Compute<S>;

  // `rivals`: how many of the largest logits of a pixel the kernel looks for (see mark_rivals); 0: it marks itself the
  // classes that it needs.
  UpTiles(const Problem& problem, int rivals) : problem_(problem), rivals_(rivals) {
    const int64_t N = problem.logits.size[0];
    C_ = problem.logits.size[1], h_ = problem.logits.size[2], w_ = problem.logits.size[3];
    H_ = problem.labels.size[1], W_ = problem.labels.size[2];
    bands_ = ceil_div(h_, kBand);
    columns_ = ceil_div(w_, kLanes) * kLanes;
    stride_ = columns_ + kGroup;

    first_row_.assign(h_ + 1, H_);
    weight_y_.resize(H_);
    for (int64_t y = H_ - 1; y >= 0; --y) {
      const Tap tap = bilinear_tap(y, h_, H_, problem.align_corners);
      first_row_[tap.i0] = y;
      weight_y_[y] = static_cast<A>(tap.w1);
    }
    for (int64_t q = h_ - 1; q >= 0; --q) first_row_[q] = std::min(first_row_[q], first_row_[q + 1]);

    // A block's resampling along x is a small matrix; where it would be a large one (logits that become fewer), its
    // taps are looked up instead.
    blocks_.resize(ceil_div(W_, kLanes));
    taps_.resize(blocks_.size() * kLanes);
    for (size_t b = 0; b < blocks_.size(); ++b) {
      Tap* taps = taps_.data() + b * kLanes;
      const int count = static_cast<int>(std::min<int64_t>(kLanes, W_ - b * kLanes));
      for (int p = 0; p < count; ++p) taps[p] = bilinear_tap(b * kLanes + p, w_, W_, problem.align_corners);
      const int64_t columns = taps[count - 1].i1 - taps[0].i0 + 1;
      blocks_[b] = {taps[0].i0, static_cast<int>(columns), count, static_cast<int64_t>(weights_x_.size()),
                    static_cast<int64_t>(transposed_x_.size())};
      if (!has_matrix(blocks_[b])) continue;
      const int taps_together = taps_at_once(blocks_[b].columns);
      weights_x_.resize(weights_x_.size() + ceil_div(columns, taps_together) * taps_together * kLanes);
      A* matrix = weights_x_.data() + blocks_[b].matrix;
      for (int p = 0; p < count; ++p) {
        matrix[(taps[p].i0 - taps[0].i0) * kLanes + p] = A(1) - static_cast<A>(taps[p].w1);
        matrix[(taps[p].i1 - taps[0].i0) * kLanes + p] += static_cast<A>(taps[p].w1);
      }
      transposed_x_.resize(transposed_x_.size() + ceil_div(columns, kGroup) * kGroup * kLanes);
      A* transposed = transposed_x_.data() + blocks_[b].transposed;
      for (int64_t i = 0; i < columns; ++i)
        for (int p = 0; p < kLanes; ++p)
          transposed[(i / kGroup * kLanes + p) * kGroup + i % kGroup] = matrix[i * kLanes + p];
    }
    // To look for rivals costs as much as to go through the classes for two pixels between four logits.
    looks_for_rivals_ = rivals > 0 && H_ * W_ >= 6 * h_ * w_;
    if (problem.grad) shared_rows_.resize(2 * N * bands_ * C_ * stride_);
  }
  int64_t items() const { return problem_.logits.size[0] * bands_; }
  int64_t items_per_image() const { return bands_; }

  struct Block {
    int64_t first;       // column of logits
    int columns;         // of logits that it reads
    int count;           // of pixels along x
    int64_t matrix;      // where its weights_x_ [columns, rounded up to taps_at_once][kLanes] begin
    int64_t transposed;  // where its transposed_x_ [ceil_div(columns, kGroup)][kLanes][kGroup] begin
  };

  // What a kernel sees of a tile, and what it does with each block of it: begin, mark, list, read t0 and t1; write the
  // listed classes' gradients in their place, add.
  struct Tile {
    int64_t n, y, x;  // image, first row and column of pixels
    int rows, count;  // of pixels
    A w0[kRows], w1[kRows];  // of the upper and the lower row of logits; 0 behind the last row of pixels

    // The classes that can be among the largest in block b are marked.
    SEGADV_INLINE void begin(int b) {
      block = tiles->blocks_.data() + x / kLanes + b;
      p0 = b * kLanes;
      listed = 0;
      uint8_t* to = marks.data() + 1;
      const int64_t C = tiles->C_;
      if (!tiles->looks_for_rivals_) {
        std::fill(to, to + C, tiles->rivals_ > 0);
        return;
      }
      const uint8_t* from = rivals.data() + block->first;
      const int quads = std::max(block->columns - 1, 1);
      for (int64_t c = 0; c < C; ++c, from += tiles->columns_) {
        uint8_t any = from[0];
        for (int i = 1; i < quads; ++i) any |= from[i];
        to[c] = any;
      }
    }
    SEGADV_INLINE void unmark() { std::fill(marks.begin(), marks.end(), 0); }
    // -1, which stands for no class, is allowed.
    SEGADV_INLINE void mark(int32_t c) { marks[c + 1] = 1; }
    SEGADV_INLINE void mark_labels(const TileMap<int32_t>& y) {
      std::fill(labelled.begin(), labelled.end(), 0);
      for (int r = 0; r < rows; ++r)
        for (int p = 0; p < kLanes; ++p) labelled[y[r][p0 + p] + 1] = 1;
      for (size_t c = 0; c < marks.size(); ++c) marks[c] |= labelled[c];
    }
    // Whether a pixel of the block has this label; after mark_labels.
    SEGADV_INLINE bool has_label(int32_t c) const { return labelled[c + 1]; }

    // The marked classes in ascending order.
    SEGADV_INLINE void list_classes() {
      const int64_t C = tiles->C_;
      int count = 0;
      for (int64_t c = 0; c < C; ++c) {
        classes[count] = static_cast<int32_t>(c);
        count += marks[c + 1];
      }
      listed = count;
    }

    // The same, and their logits resampled along x.
    SEGADV_INLINE void list() {
      list_classes();
      const A *from0 = upper + block->first, *from1 = lower + block->first;
      if (tiles->has_matrix(*block) && finite) {
        expand_classes(from0, from1, tiles->stride_, classes.data(), listed, tiles->weights_x_.data() + block->matrix,
                       block->columns, t0.data(), t1.data());
        return;
      }
      for (int i = 0; i < listed; ++i) {
        look_up(from0 + classes[i] * tiles->stride_, t0.data() + i * kLanes);
        look_up(from1 + classes[i] * tiles->stride_, t1.data() + i * kLanes);
      }
    }

    SEGADV_INLINE void list_all() {
      if (listed == tiles->C_) return;
      std::fill(marks.begin(), marks.end(), 1);
      list();
    }

    // Adds the gradients of t0 and t1, which have taken their place, to the sums.
    SEGADV_INLINE void add() {
      A *to0 = sum0 + block->first, *to1 = sum1 + block->first;
      const A* weight = tiles->transposed_x_.data() + block->transposed;
      for (int i = 0;; ++i) {
        if (tiles->has_matrix(*block)) {
          i = add_classes(t0.data(), t1.data(), classes.data(), i, listed, weight, block->columns, to0, to1,
                          tiles->stride_);
        }
        if (i >= listed) return;
        add_to_taps(t0.data() + i * kLanes, t1.data() + i * kLanes, to0 + classes[i] * tiles->stride_,
                    to1 + classes[i] * tiles->stride_);
      }
    }
    int blocks() const { return static_cast<int>(ceil_div(count, kLanes)); }

    int p0;                        // the block's first column, counted in the tile
    bool finite;                   // whether all logits of both rows are
    int listed = 0;                // classes listed
    std::vector<int32_t> classes;  // [listed]
    std::vector<A> t0, t1;         // [listed][kLanes]: both rows of logits, or their gradients

   private:
    friend class UpTiles;
    // Where a logit or a gradient is not finite: it must reach nothing but its neighbours, not even with weight 0.
    SEGADV_INLINE void add_to_taps(const A* g0, const A* g1, A* to0, A* to1) const {
      const Tap* taps = tiles->taps_of(*block);
      for (int p = 0; p < block->count; ++p) {
        const A w1 = static_cast<A>(taps[p].w1), w0 = A(1) - w1;
        const int64_t i0 = taps[p].i0 - block->first, i1 = taps[p].i1 - block->first;
        to0[i0] += w0 * g0[p], to1[i0] += w0 * g1[p];
        to0[i1] += w1 * g0[p], to1[i1] += w1 * g1[p];
      }
    }
    SEGADV_INLINE void look_up(const A* row, A* to) const {
      const Tap* taps = tiles->taps_of(*block);
      for (int p = 0; p < block->count; ++p) {
        const A w1 = static_cast<A>(taps[p].w1);
        to[p] = (A(1) - w1) * row[taps[p].i0 - block->first] + w1 * row[taps[p].i1 - block->first];
      }
    }

    const UpTiles* tiles;
    const Block* block;
    const A *upper = nullptr, *lower = nullptr;  // [C][stride]
    A *sum0, *sum1;                              // [C][stride]
    std::vector<uint8_t> rivals;                 // [C][columns]
    std::vector<uint8_t> marks, labelled;        // [1 + C]
  };

  // Calls body(tile) for every tile of an item.
  template <class Body>
  SEGADV_INLINE void walk(int64_t item, Body&& body) {
    const TensorView &logits = problem_.logits, &grad = problem_.grad;
    const int64_t row = C_ * stride_;
    std::vector<A> rows(logits ? 2 * row : 0), sums(grad ? 2 * row : 0);
    A *upper = rows.data(), *lower = rows.data() + (logits ? row : 0);
    Tile tile{};
    tile.tiles = this;
    tile.n = item / bands_;
    tile.sum0 = sums.data(), tile.sum1 = sums.data() + (grad ? row : 0);
    tile.rivals.resize(looks_for_rivals_ ? C_ * columns_ : 0);
    tile.marks.resize(C_ + 1);
    tile.labelled.resize(C_ + 1);
    tile.classes.resize(C_);
    tile.t0.resize(C_ * kLanes), tile.t1.resize(C_ * kLanes);
    const int64_t q_begin = item % bands_ * kBand, q_end = std::min(q_begin + kBand, h_);
    bool upper_finite, lower_finite = logits && load_row(tile.n, q_begin, lower);
    for (int64_t q = q_begin; q < q_end; ++q) {
      const int64_t y_begin = first_row_[q], y_end = first_row_[q + 1];
      if (logits) {
        std::swap(upper, lower);
        upper_finite = lower_finite;
        lower_finite = load_row(tile.n, std::min(q + 1, h_ - 1), lower);
        tile.upper = upper, tile.lower = lower;
        tile.finite = upper_finite && lower_finite;
        if (looks_for_rivals_ && y_begin < y_end) {
          mark_rivals(upper, lower, stride_, columns_, C_, rivals_, tile.rivals.data());
        }
      }
      for (tile.y = y_begin; tile.y < y_end; tile.y += kRows) {
        tile.rows = static_cast<int>(std::min<int64_t>(kRows, y_end - tile.y));
        for (int r = 0; r < kRows; ++r) {
          tile.w1[r] = r < tile.rows ? weight_y_[tile.y + r] : A(0);
          tile.w0[r] = r < tile.rows ? A(1) - tile.w1[r] : A(0);
        }
        for (tile.x = 0; tile.x < W_; tile.x += kTile) {
          tile.count = static_cast<int>(std::min<int64_t>(kTile, W_ - tile.x));
          body(tile);
        }
      }
      if (!grad) continue;
      if (q == h_ - 1) {  // the row below the last one is the last one itself
        for (int64_t i = 0; i < row; ++i) tile.sum0[i] += tile.sum1[i];
      }
      if (q == q_begin) {
        std::copy(tile.sum0, tile.sum0 + row, shared_row(item, 0));
      } else {
        store_row(tile.n, q, tile.sum0);
      }
      std::swap(tile.sum0, tile.sum1);
      std::fill(tile.sum1, tile.sum1 + row, A(0));
    }
    if (grad) std::copy(tile.sum0, tile.sum0 + row, shared_row(item, 1));
  }

  // The first row of every band: its own sums and what the band above left for it.
  void finish() {
    if (!problem_.grad) return;
    const int64_t row = C_ * stride_;
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
  static constexpr int64_t kBand = 4;  // rows of logits in an item

  SEGADV_INLINE bool has_matrix(const Block& block) const { return block.columns <= kLanes + 2; }
  const Tap* taps_of(const Block& block) const { return taps_.data() + (&block - blocks_.data()) * kLanes; }
  A* shared_row(int64_t item, int which) { return shared_rows_.data() + (2 * item + which) * C_ * stride_; }

  // Returns whether all its logits are finite. The columns behind the last one repeat it.
  bool load_row(int64_t n, int64_t y, A* row) const {
    const TensorView& logits = problem_.logits;
    load_block<S>(at<S>(logits, n, 0, y, 0), logits.stride[1], logits.stride[3], C_, w_, row, stride_);
    for (int64_t c = 0; c < C_; ++c) {
      A* of_class = row + c * stride_;
      std::fill(of_class + w_, of_class + stride_, of_class[w_ - 1]);
    }
    return all_finite(row, C_ * stride_);
  }
  void store_row(int64_t n, int64_t y, const A* row) const {
    const TensorView& grad = problem_.grad;
    store_block<S>(row, stride_, C_, w_, at<S>(grad, n, 0, y, 0), grad.stride[1], grad.stride[3]);
  }

  const Problem& problem_;
  int rivals_;
  bool looks_for_rivals_;
  int64_t C_, h_, w_, H_, W_, bands_;
  int64_t columns_, stride_;        // w rounded up to kLanes; some more, so that column x + 1 is there, and a group
  std::vector<int64_t> first_row_;  // [h + 1]: first row of pixels whose upper tap is q or below
  std::vector<A> weight_y_;         // [H] of the lower tap
  std::vector<Block> blocks_;       // of a row
  std::vector<Tap> taps_;           // [blocks][kLanes]
  std::vector<A> weights_x_, transposed_x_;  // of all blocks
  std::vector<A> shared_rows_;  // [items][2][C][stride]: a band's first row, and its share of the row below it
};

// Some rows of a block, and how many of them there are.
template <class T>
using Rows = T[kTogether][kLanes];
using AllRows = std::integral_constant<int, kTogether>;
using OneRow = std::integral_constant<int, 1>;

// What find_best looks for: the largest logit and the label's (kOwn), the largest one's class too (kClass), or the
// largest logit but for the label's (kOthers).
struct Largest {
  static constexpr bool kOthers = false, kClass = false, kOwn = true;
};
struct LargestAndClass {
  static constexpr bool kOthers = false, kClass = true, kOwn = true;
};
struct LargestOfOthers {
  static constexpr bool kOthers = true, kClass = true, kOwn = true;
};
struct Prediction {
  static constexpr bool kOthers = false, kClass = true, kOwn = false;
};

// Goes through the listed classes, for rows r0 ... r0 + kTogether - 1 of the tile's block. Classes by the tie rule.
template <class What, class T, class A>
SEGADV_INLINE void find_best(What, const T& tile, int r0, const TileMap<int32_t>& y, Rows<A>& to_best,
                             Rows<int32_t>& to_class, Rows<A>& to_own) {
  const int p0 = tile.p0;
  Rows<A> best, own;  // local, so that the compiler keeps them in registers
  Rows<int32_t> best_class;
  for (int r = 0; r < kTogether; ++r) {
    for (int p = 0; p < kLanes; ++p) {
      best[r][p] = -std::numeric_limits<A>::infinity();
      best_class[r][p] = What::kOthers ? lowest_other_class(y[r0 + r][p0 + p]) : 0;
      own[r][p] = A(0);
    }
  }
  const auto search = [&](auto finite, auto rows) SEGADV_BODY {
    for (int i = 0; i < tile.listed; ++i) {
      const int32_t k = tile.classes[i];
      const A *t0 = tile.t0.data() + i * kLanes, *t1 = tile.t1.data() + i * kLanes;
      for (int r = 0; r < rows; ++r) {
        const A w0 = tile.w0[r0 + r], w1 = tile.w1[r0 + r];
        const int32_t* label = y[r0 + r] + p0;
        SEGADV_SIMD
        for (int p = 0; p < kLanes; ++p) {
          const A z = w0 * t0[p] + w1 * t1[p], old = best[r][p];
          bool takes = finite ? z > old : beats(z, old);
          if constexpr (What::kOthers) takes &= label[p] != k;
          if constexpr (!What::kOthers && finite) {
            best[r][p] = z > old ? z : old;  // one instruction
          } else {
            best[r][p] = select(takes, z, old);
          }
          if constexpr (What::kClass) {
            const int32_t old_class = best_class[r][p];
            best_class[r][p] = select(takes, k, old_class);
          }
          if constexpr (What::kOwn) {
            const A old_own = own[r][p];
            own[r][p] = select(label[p] == k, z, old_own);
          }
        }
      }
    }
  };
  if (!tile.finite) {
    search(std::false_type(), AllRows());
  } else if (r0 + kTogether <= tile.rows) {
    search(std::true_type(), AllRows());
  } else {
    search(std::true_type(), OneRow());
  }
  std::memcpy(to_best, best, sizeof(best));
  if constexpr (What::kClass) std::memcpy(to_class, best_class, sizeof(best_class));
  if constexpr (What::kOwn) std::memcpy(to_own, own, sizeof(own));
}

// Labels of a tile, -1 where a pixel is not valid and where there is none. Returns the number of valid pixels.
template <class T>
SEGADV_INLINE int load_labels(const Problem& problem, const T& tile, TileMap<int32_t>& y, int64_t* first_bad) {
  int valid = 0;
  for (int r = 0; r < kRows; ++r) {
    const int count = r < tile.rows ? tile.count : 0;
    if (count) valid += load_labels(problem, tile.n, tile.y + r, tile.x, count, y[r], first_bad);
    std::fill(y[r] + count, y[r] + kTile, -1);
  }
  return valid;
}
template <class T>
SEGADV_INLINE void load_classes(const TensorView& map, const T& tile, TileMap<int32_t>& classes) {
  for (int r = 0; r < kRows; ++r) {
    const int count = r < tile.rows ? tile.count : 0;
    if (count) load_classes(map, tile.n, tile.y + r, tile.x, count, classes[r]);
    std::fill(classes[r] + count, classes[r] + kTile, -1);
  }
}
template <class T>
SEGADV_INLINE void store_classes(const TensorView& map, const T& tile, const TileMap<int32_t>& classes) {
  for (int r = 0; r < tile.rows; ++r) store_classes(map, tile.n, tile.y + r, tile.x, tile.count, classes[r]);
}

// Maps [N, H, W] of the compute type.
template <class T, class A>
SEGADV_INLINE void load_map(const TensorView& map, const T& tile, TileMap<A>& values) {
  for (int r = 0; r < kRows; ++r) {
    const int count = r < tile.rows ? tile.count : 0;
    const A* from = count ? at<A>(map, tile.n, tile.y + r, tile.x) : nullptr;
    for (int p = 0; p < count; ++p) values[r][p] = from[p * map.stride[2]];
    std::fill(values[r] + count, values[r] + kTile, A(0));
  }
}
template <class T, class A>
SEGADV_INLINE void store_map(const TensorView& map, const T& tile, const TileMap<A>& values) {
  for (int r = 0; r < tile.rows; ++r) std::copy_n(values[r], tile.count, at<A>(map, tile.n, tile.y + r, tile.x));
}

// Calls f(tiles) with the walk that fits the problem and its storage type.
template <class F>
void dispatch_tiles(const Problem& problem, const TensorView& map, int rivals, F&& f) {
  dispatch_floating(problem.logits.dtype, [&](auto tag) {
    using S = typename decltype(tag)::type;
    const TensorView &logits = problem.logits, &labels = problem.labels;
    if (logits.size[2] == labels.size[1] && logits.size[3] == labels.size[2]) {
      FullTiles<S> tiles(problem, map);
      f(tiles);
    } else {
      UpTiles<S> tiles(problem, rivals);
      f(tiles);
    }
  });
}

}  // namespace segadv::cpu
