// The three products of a projection y = x W^T + b, in bfloat16 on AMX tiles: the forward, the gradient of x and the
// gradient of W. Of any number of rows, with nothing prepared for a shape: row counts change at every step of packed
// batches, and what oneDNN compiles for each new one costs a step 10 to 80 ms. With few rows the weights' way through
// memory is all there is: the forward reads them as they lie, once.
//
// A product is C = A B. A is read in place, B in panels that are packed for the tiles: 32 columns, for each 32 values of
// depth two tiles of 16 x 16 units (a unit is two values that are neighbours in depth). Sums are float32, along the
// depth in one order whatever the number of threads; results are rounded once.
#include <omp.h>

#include <algorithm>

#include "gelu.h"
#include "pack.h"
#include "parallel.h"
#include "stopgo.h"

#if defined(STOPGO_AMX)

namespace stopgo {
namespace {

constexpr int64_t kTile = 16;                       // rows of a tile, and its columns in units
constexpr int64_t kDeep = 32;                       // values of depth in a tile
constexpr int64_t kBlock = 32;                      // columns of a block of B: two tiles
constexpr int64_t kBlockUnits = 2 * kTile * kTile;  // of a block, for one step of depth
constexpr int64_t kPanel = 64;                      // columns that a task packs and multiplies
constexpr int64_t kAhead = 2048;                     // values that are asked for before they are packed
constexpr int64_t kFewRows = 64;                      // up to so many, weights are read as they lie
constexpr int64_t kNearBytes = 1 << 20;           // of A, that stay in a core's second cache while panels go by
constexpr int64_t kPart = 2048;                       // of a depth that is too long to stay there

typedef const BFloat16* Values;

// Tile rows of A, of which the last are copied and padded with zeros: a tile load reads 16 rows whatever is there.
class LeftRows {
 public:
  LeftRows(Values at, int64_t stride, int64_t rows, int64_t depth, BFloat16* memory)
      : at_(at), stride_(stride), whole_(rows / kTile * kTile), depth_(depth), tail_(memory) {
    if (whole_ == rows) return;
    std::memset(tail_, 0, sizeof(BFloat16) * kTile * depth);
    for (int64_t r = whole_; r < rows; ++r)
      std::memcpy(tail_ + (r - whole_) * depth, at_ + r * stride_, sizeof(BFloat16) * depth);
  }

  const BFloat16* tile(int64_t r) const { return r < whole_ ? at_ + r * stride_ : tail_; }
  int64_t bytes(int64_t r) const { return 2 * (r < whole_ ? stride_ : depth_); }

 private:
  Values at_;
  int64_t stride_, whole_, depth_;
  BFloat16* tail_;
};

BFloat16* tail_scratch(int64_t depth) {
  static thread_local Scratch scratch;
  return scratch.get<BFloat16>(kTile * depth);
}

enum class Sums { kFromZero, kGoOn };

// C [16 kRows][32] float32 = or += A times a block of B. The tiles take 16 cycles a product, in which the vector units
// have nothing to do: `chore` is called once for each step of depth.
template <int kRows, Sums kSums = Sums::kFromZero, class Chore>
inline void multiply(int64_t depth, Values a0, int64_t a0_bytes, Values a1, int64_t a1_bytes, const uint32_t* b,
                     float* c, Chore&& chore) {
  constexpr int64_t kBytes = 4 * kBlock;
  float* c1 = c + kTile * kBlock;
  asm volatile("" ::: "memory");  // GCC's tile loads do not say that they read memory
  if (kSums == Sums::kFromZero) {
    _tile_zero(0);
    _tile_zero(1);
    if (kRows > 1) _tile_zero(2);
    if (kRows > 1) _tile_zero(3);
  } else {
    _tile_loadd(0, c, kBytes);
    _tile_loadd(1, c + kTile, kBytes);
    if (kRows > 1) _tile_loadd(2, c1, kBytes);
    if (kRows > 1) _tile_loadd(3, c1 + kTile, kBytes);
  }
  for (int64_t k = 0; k < depth; k += kDeep, b += kBlockUnits) {
    _tile_loadd(4, a0 + k, a0_bytes);
    _tile_loadd(6, b, 4 * kTile);
    _tile_dpbf16ps(0, 4, 6);
    _tile_loadd(7, b + kTile * kTile, 4 * kTile);
    _tile_dpbf16ps(1, 4, 7);
    if (kRows > 1) {
      _tile_loadd(5, a1 + k, a1_bytes);
      _tile_dpbf16ps(2, 5, 6);
      _tile_dpbf16ps(3, 5, 7);
    }
    chore();
  }
  _tile_stored(0, c, kBytes);
  _tile_stored(1, c + kTile, kBytes);
  if (kRows > 1) _tile_stored(2, c1, kBytes);
  if (kRows > 1) _tile_stored(3, c1 + kTile, kBytes);
  asm volatile("" ::: "memory");
}

// --- Packing of B: panels of 64 columns over the whole depth, in depth / 2 pieces --------------------------------------

struct Panel {
  int64_t column, columns, depth;
  uint32_t* to;

  uint32_t* block(int64_t c) const { return to + c / kBlock * (depth / kDeep * kBlockUnits); }
};

// B = W^T, W [columns][depth]: units lie along its rows. A piece is four units of 16 rows.
struct Transposed {
  Values w;
  int64_t stride;

  STOPGO_INLINE void pack(const Panel& panel, int64_t piece) const {
    const int64_t pieces = panel.depth / 8, tile = piece / pieces, unit = piece % pieces * 4;  // of a tile of columns
    if (tile * kTile >= panel.columns) return;
    const auto* from = reinterpret_cast<const uint32_t*>(w + (panel.column + tile * kTile) * stride) + unit;
    uint32_t* to = panel.block(tile * kTile) + unit / kTile * kBlockUnits + tile % 2 * (kTile * kTile);
    turning::turn_four_columns(from, stride / 2, to + unit % kTile * kTile, kTile);
  }
};

// B [rows][columns] as it lies: units of two of its rows, even columns in the first tile, odd ones in the second. A
// piece is two rows; those beyond the last count as zeros, up to the whole depth.
struct Paired {
  Values b;
  int64_t stride, rows;
  int64_t ahead = kAhead;

  STOPGO_INLINE void pack(const Panel& panel, int64_t piece) const {
    const int64_t r = 2 * piece;
    for (int64_t c = 0; c < panel.columns; c += kBlock) {
      uint32_t* to = panel.block(c) + r / kDeep * kBlockUnits + r % kDeep / 2 * kTile;
      const Values from = b + r * stride + panel.column + c;
      for (const Values row : {from, from + stride}) ask_for(row + ahead);
      const Words x = r < rows ? raw_load<Words>(from, Whole{}) : Words{};
      const Words y = r + 1 < rows ? raw_load<Words>(from + stride, Whole{}) : Words{};
      raw_store(to, (x & 0xFFFFu) | (y << 16), Whole{});
      raw_store(to + kTile * kTile, (x >> 16) | (y & 0xFFFF0000u), Whole{});
    }
  }
};

// --- Results ----------------------------------------------------------------------------------------------------------

// Rows of 32 sums, in their order or even columns first, to bfloat16.
STOPGO_INLINE __m512i rounded(Floats low, Floats high) { return bits_as<__m512i>(_mm512_cvtne2ps_pbh(high, low)); }

enum class Order { kPlain, kEvenFirst };

template <Order kOrder>
STOPGO_INLINE __m512i narrowed(Floats a, Floats b) {
  return kOrder == Order::kPlain ? rounded(a, b) : Layout<2>::joined(a, b);
}

// C [rows][columns] += or =; what a task writes of it.
template <Order kOrder>
struct Output {
  BFloat16* at;
  int64_t stride;
  const BFloat16* bias;  // [columns] or null; in plain order only
  bool add, streaming;

  // One row of 32 sums.
  STOPGO_INLINE void put(const float* sums, int64_t row, int64_t column) const {
    BFloat16* to = at + row * stride + column;
    Floats a = load(sums), b = load(sums + kTile);
    if (bias != nullptr) {
      a += load(bias + column);
      b += load(bias + column + kTile);
    }
    if (add) {
      const Words before = raw_load<Words>(to, Whole{});
      a += kOrder == Order::kPlain ? load(to) : bits_as<Floats>(before << 16);
      b += kOrder == Order::kPlain ? load(to + kTile) : bits_as<Floats>(before & 0xFFFF0000u);
    }
    const __m512i values = narrowed<kOrder>(a, b);
    if (streaming)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), values);
    else
      _mm512_storeu_si512(to, values);
  }
};

// Two vectors of neighbours' halves: even columns, odd columns.
struct Halves {
  Floats even, odd;

  STOPGO_INLINE static Halves of(Words line) {
    return {bits_as<Floats>(line << 16), bits_as<Floats>(line & 0xFFFF0000u)};
  }
  STOPGO_INLINE static Halves at(const BFloat16* from) { return of(raw_load<Words>(from, Whole{})); }
};

// Bytes of a row as they are.
struct PlainLine {
  BFloat16* at;

  STOPGO_INLINE void put(int64_t offset, int64_t, Words line) const { raw_store(at + offset, line, Whole{}); }
};

// Also what a GELU with bias makes of them.
struct ActivatedLine {
  BFloat16* at;
  const BFloat16* bias;
  BFloat16* activated;
  const TableGelu& gelu;

  STOPGO_INLINE void put(int64_t offset, int64_t column, Words line) const {
    raw_store(at + offset, line, Whole{});
    const Halves x = Halves::of(line), b = Halves::at(bias + column);
    const __m512i y = Layout<2>::joined(gelu.y(x.even + b.even), gelu.y(x.odd + b.odd));
    raw_store(activated + offset, bits_as<Words>(y), Whole{});
  }
};

// C = A B, and gelu(C + bias) beside it.
struct ActivatedOutput {
  ActivatedLine line;
  int64_t stride;

  STOPGO_INLINE void put(const float* sums, int64_t row, int64_t column) const {
    line.put(row * stride + column, column, bits_as<Words>(rounded(load(sums), load(sums + kTile))));
  }
};

// (A B) gelu'(inner + bias), even columns first; `inner` becomes gelu(inner + bias).
struct GeluGradientOutput {
  BFloat16 *at, *inner;
  const BFloat16* bias;
  int64_t stride;
  const TableGelu& gelu;

  STOPGO_INLINE void put(const float* sums, int64_t row, int64_t column) const {
    BFloat16* place = inner + row * stride + column;
    const Halves x = Halves::at(place), b = Halves::at(bias + column);
    const GeluAndSlope even = gelu.both(x.even + b.even), odd = gelu.both(x.odd + b.odd);
    raw_store(place, bits_as<Words>(Layout<2>::joined(even.y, odd.y)), Whole{});
    const auto gradient = Layout<2>::joined(load(sums) * even.slope, load(sums + kTile) * odd.slope);
    raw_store(at + row * stride + column, bits_as<Words>(gradient), Whole{});
  }
};

// The transpose of C: 32 columns of sums [32][16 x tiles] become 64 bytes of a row.
template <class Line>
struct TurnedOutput {
  Line line;
  int64_t stride;
  const BFloat16* bias;  // [rows of C] or null

  // sums: C [32][32], of which `columns` are wanted; row, column: of C.
  void put(const float* sums, int64_t columns, int64_t row, int64_t column) const {
    alignas(64) uint32_t pairs[kTile * kTile], turned[kTile * kTile];
    for (int64_t c = 0; c < columns; c += kTile) {
      for (int64_t r = 0; r < kBlock; r += 2) {
        Floats a = load(sums + r * kBlock + c), b = load(sums + (r + 1) * kBlock + c);
        if (bias != nullptr) {
          a += broadcast(load_one(bias + row + r));
          b += broadcast(load_one(bias + row + r + 1));
        }
        raw_store(pairs + r / 2 * kTile, bits_as<Words>(Layout<2>::joined(a, b)), Whole{});
      }
      for (int64_t i = 0; i < kTile; i += 4)
        turning::turn_four_columns(pairs + i, kTile, turned + i * kTile, kTile);
      for (int64_t i = 0; i < std::min(kTile, columns - c); ++i)
        line.put((column + c + i) * stride + row, row, raw_load<Words>(turned + i * kTile, Whole{}));
    }
  }
};

// --- The loops --------------------------------------------------------------------------------------------------------

// What the vector units do while the tiles multiply: round the last block of sums, and pack the next panel of B.
template <class Source, class Out>
class Chores {
 public:
  Chores(const Source& source, const Out& out) : source_(source), out_(out) {}

  void pack(const Panel& panel, int64_t at_a_time) {
    panel_ = panel, piece_ = 0, pieces_ = panel.depth / 2, pieces_at_a_time_ = at_a_time;
  }
  void round(const float* sums, int64_t rows, int64_t row, int64_t column, int64_t at_a_time) {
    sums_ = sums, r_ = 0, rows_ = rows, row_ = row, column_ = column, rows_at_a_time_ = at_a_time;
  }

  STOPGO_INLINE void operator()() {
    for (int64_t i = 0; i < rows_at_a_time_ && r_ < rows_; ++i) next_row();
    for (int64_t i = 0; i < pieces_at_a_time_ && piece_ < pieces_; ++i) next_piece();
  }
  void finish_rows() {
    while (r_ < rows_) next_row();
  }
  void finish_panel() {
    while (piece_ < pieces_) next_piece();
  }

 private:
  STOPGO_INLINE void next_row() {
    out_.put(sums_ + r_ * kBlock, row_ + r_, column_);
    ++r_;
  }
  STOPGO_INLINE void next_piece() { source_.pack(panel_, piece_++); }

  const Source source_;
  const Out out_;
  Panel panel_{};
  int64_t piece_ = 0, pieces_ = 0, pieces_at_a_time_ = 0;
  const float* sums_ = nullptr;
  int64_t r_ = 0, rows_ = 0, row_ = 0, column_ = 0, rows_at_a_time_ = 0;
};

constexpr int64_t parts(int64_t n, int64_t of) { return (n + of - 1) / of; }

// How a product is cut into tasks: a panel of B, and as many rows of A as stay in the second cache while panels go by.
struct Cut {
  static constexpr int64_t kRows = 2 * kTile;  // of a block of C

  int64_t rows, columns, depth;
  int64_t panels = parts(columns, kPanel);
  int64_t chunk = round_up(parts(rows, parts(rows, std::max(kNearBytes / (2 * depth), 4 * kRows))), kRows);
  int64_t chunks = parts(rows, chunk);  // after rounding up, so that none is empty
  int64_t panel_units = kPanel / 2 * depth;

  int64_t tasks() const { return chunks * panels; }
  Panel panel(int64_t number, uint32_t* memory) const {
    return {number * kPanel, std::min(kPanel, columns - number * kPanel), depth, memory};
  }
  int64_t first_row(int64_t task) const { return task / panels * chunk; }
  int64_t last_row(int64_t task) const { return std::min(rows, first_row(task) + chunk); }
  // How often chores are called in a task.
  int64_t calls(int64_t task) const {
    return parts(last_row(task) - first_row(task), kRows) * parts(panel(task % panels, nullptr).columns, kBlock) * (depth / kDeep);
  }
};

typedef float SumsTwice[2][Cut::kRows * kBlock];  // the block that is multiplied, and the one that is rounded

// Rows of C in one panel, which is packed.
template <class Source, class Out>
void multiply_rows(const LeftRows& left, int64_t first, int64_t last, const Panel& panel, SumsTwice& sums,
                   Chores<Source, Out>& chores) {
  const int64_t at_a_time = parts(Cut::kRows, panel.depth / kDeep);
  int64_t turn = 0;
  for (int64_t r = first; r < last; r += Cut::kRows)
    for (int64_t c = 0; c < panel.columns; c += kBlock) {
      float* to = sums[turn ^= 1];
      if (last - r > kTile)
        multiply<2>(panel.depth, left.tile(r), left.bytes(r), left.tile(r + kTile), left.bytes(r + kTile),
                    panel.block(c), to, chores);
      else
        multiply<1>(panel.depth, left.tile(r), left.bytes(r), nullptr, 0, panel.block(c), to, chores);
      chores.finish_rows();
      chores.round(to, std::min(Cut::kRows, last - r), r, panel.column + c, at_a_time);
    }
  chores.finish_rows();
}

// C [rows][columns] = A [rows][depth] B, where B lies in the direction of its depth: each panel is packed while the one
// before it is multiplied. The depth is a multiple of 32.
template <class Out>
void product(const Cut& cut, const LeftRows& left, const Transposed& source, const Out& out) {
#pragma omp parallel
  {
    const int64_t threads = omp_get_num_threads(), thread = omp_get_thread_num();
    const int64_t first = cut.tasks() * thread / threads, last = cut.tasks() * (thread + 1) / threads;
    auto* memory = own_scratch().get<uint32_t>(2 * cut.panel_units);
    const auto panel = [&](int64_t task) { return cut.panel(task % cut.panels, memory + task % 2 * cut.panel_units); };
    alignas(64) SumsTwice sums;
    TileMath::Session session;
    Chores<Transposed, Out> chores(source, out);
    if (first < last) chores.pack(panel(first), 0);
    for (int64_t task = first; task < last; ++task) {
      chores.finish_panel();
      if (task + 1 < last) chores.pack(panel(task + 1), parts(cut.depth / 2, cut.calls(task)));
      multiply_rows(left, cut.first_row(task), cut.last_row(task), panel(task), sums, chores);
    }
  }
}

// The same where B lies across its depth. Row by row is the only way through it at the memory's speed, so it is packed
// whole, before anything is multiplied. To be called by all threads.
void pack_all(const Cut& cut, const Paired& source, uint32_t* packed) {
#pragma omp for schedule(static)
  for (int64_t step = 0; step < cut.depth / kDeep; ++step)
    for (int64_t i = step * kDeep / 2; i < (step + 1) * kDeep / 2; ++i)
      for (int64_t p = 0; p < cut.panels; ++p) source.pack(cut.panel(p, packed + p * cut.panel_units), i);
}

template <class Out>
void product(const Cut& cut, const LeftRows& left, const Paired& source, const Out& out) {
  auto* packed = call_scratch().get<uint32_t>(cut.panels * cut.panel_units);
#pragma omp parallel
  {
    pack_all(cut, source, packed);
    alignas(64) SumsTwice sums;
    TileMath::Session session;
    Chores<Paired, Out> chores(source, out);
#pragma omp for schedule(static) nowait
    for (int64_t task = 0; task < cut.tasks(); ++task) {
      const int64_t p = task % cut.panels;
      multiply_rows(left, cut.first_row(task), cut.last_row(task), cut.panel(p, packed + p * cut.panel_units), sums, chores);
    }
  }
}

// The same with C written row by row, for one that is large beside A and B.
template <class Out>
void wide_product(const Cut& cut, const LeftRows& left, const Paired& source, const Out& out) {
  const int64_t wide = std::max(kNearBytes / (2 * cut.depth) / kPanel, int64_t{1});  // panels that stay near
  auto* packed = call_scratch().get<uint32_t>(cut.panels * cut.panel_units);
#pragma omp parallel
  {
    pack_all(cut, source, packed);
    alignas(64) SumsTwice sums;
    TileMath::Session session;
    Chores<Paired, Out> chores(source, out);
    for (int64_t from = 0; from < cut.panels; from += wide) {
#pragma omp for schedule(static) nowait
      for (int64_t r = 0; r < cut.rows; r += Cut::kRows)
        for (int64_t p = from; p < std::min(cut.panels, from + wide); ++p)
          multiply_rows(left, r, std::min(cut.rows, r + Cut::kRows), cut.panel(p, packed + p * cut.panel_units), sums, chores);
    }
    finish_streams();
  }
}

// The same over a depth of which a panel would fill the cache: part by part, with the sums of a group of panels kept
// between parts. A thread has the same rows of C in all of them. Rows are whole blocks.
template <class Out>
void deep_product(const Cut& cut, const LeftRows& left, const Paired& source, const Out& out) {
  const int64_t wide = std::max(kNearBytes / (2 * kPart) / kPanel, int64_t{1});
  static thread_local Scratch scratch;
  auto* packed = call_scratch().get<uint32_t>(cut.panels * cut.panel_units);
  auto* kept = scratch.get<float>(cut.rows * wide * kPanel);
#pragma omp parallel
  {
    pack_all(cut, source, packed);
    TileMath::Session session;
    Chores<Paired, Out> chores(source, out);
    for (int64_t from = 0; from < cut.panels; from += wide) {
      for (int64_t k = 0; k < cut.depth; k += kPart) {
        const int64_t part = std::min(kPart, cut.depth - k);
        const bool last = k + part == cut.depth;
#pragma omp for schedule(static) nowait
        for (int64_t r = 0; r < cut.rows; r += Cut::kRows) {
          float* sums = kept + r * wide * kPanel;
          for (int64_t p = from; p < std::min(cut.panels, from + wide); ++p) {
            const Panel panel = cut.panel(p, packed + p * cut.panel_units);
            for (int64_t c = 0; c < panel.columns; c += kBlock, sums += Cut::kRows * kBlock) {
              const Values a0 = left.tile(r) + k, a1 = left.tile(r + kTile) + k;
              const int64_t bytes = left.bytes(r);
              const uint32_t* b = panel.block(c) + k / kDeep * kBlockUnits;
              if (k == 0)
                multiply<2>(part, a0, bytes, a1, bytes, b, sums, chores);
              else
                multiply<2, Sums::kGoOn>(part, a0, bytes, a1, bytes, b, sums, chores);
              chores.finish_rows();
              if (last) chores.round(sums, Cut::kRows, r, panel.column + c, parts(Cut::kRows, part / kDeep));
            }
          }
        }
        chores.finish_rows();
      }
    }
    finish_streams();
  }
}

// y = x W^T with few rows: C = W x^T, so that W is read as it lies.
template <class Line>
void forward_few(int64_t rows, int64_t width, int64_t depth, Values x, int64_t x_stride, Values w,
                 const TurnedOutput<Line>& out) {
  const int64_t blocks = parts(rows, kBlock), whole = rows / kBlock, block_units = kBlock / 2 * depth;
  auto* memory = call_scratch().get<uint32_t>((blocks + 1) * block_units);
  auto* last = reinterpret_cast<BFloat16*>(memory + blocks * block_units);  // rows, zeros where there are none
  if (whole < blocks) {
    std::memset(last, 0, sizeof(BFloat16) * kBlock * depth);
    for (int64_t r = whole * kBlock; r < rows; ++r)
      std::memcpy(last + (r - whole * kBlock) * depth, x + r * x_stride, sizeof(BFloat16) * depth);
  }
#pragma omp parallel
  {
    TileMath::Session session;
#pragma omp for schedule(static)
    for (int64_t block = 0; block < blocks; ++block) {
      const Transposed source = block < whole ? Transposed{x + block * kBlock * x_stride, x_stride}
                                              : Transposed{last, depth};
      for (int64_t i = 0; i < depth / 4; ++i) source.pack({0, kBlock, depth, memory + block * block_units}, i);
    }
    alignas(64) float sums[2 * kTile * kBlock];
#pragma omp for schedule(static)
    for (int64_t n = 0; n < width; n += 2 * kTile)
      for (int64_t block = 0; block < blocks; ++block) {
        const Values w0 = w + n * depth, w1 = w0 + kTile * depth;
        multiply<2>(depth, w0, 2 * depth, w1, 2 * depth, memory + block * block_units, sums, [] {});
        out.put(sums, std::min(kBlock, rows - block * kBlock), n, block * kBlock);
      }
  }
}

// Both values of each of 16 units.
STOPGO_INLINE Floats sum_of_pair(const uint32_t* units) {
  const Words both = raw_load<Words>(units, Whole{});
  return bits_as<Floats>(both << 16) + bits_as<Floats>(both & 0xFFFF0000u);
}

// out [columns][depth] = x^T, x [rows][columns]; zeros beyond the rows. Rows of out are out_stride apart. sums: null, or
// [columns], the sums of x over its rows.
void turn(int64_t rows, int64_t depth, int64_t columns, Values x, int64_t stride, BFloat16* out, int64_t out_stride,
          BFloat16* sums) {
#pragma omp parallel for schedule(static)
  for (int64_t c = 0; c < columns; c += kBlock) {
    alignas(64) uint32_t units[kBlockUnits];
    Floats even{}, odds{};
    for (int64_t r = 0; r < depth; r += kDeep) {
      const Paired source = {x + r * stride, stride, std::min(kDeep, rows - r), kDeep * stride};
      for (int64_t i = 0; i < kDeep / 2; ++i) source.pack({c, kBlock, kDeep, units}, i);
      for (int64_t odd = 0; odd < 2; ++odd)
        for (int64_t i = 0; i < kTile; i += 4) {
          auto* to = reinterpret_cast<uint32_t*>(out + (c + 2 * i + odd) * out_stride + r);
          turning::turn_four_columns(units + odd * kTile * kTile + i, kTile, to, out_stride);
        }
      if (sums == nullptr) continue;
      for (int64_t i = 0; i < kTile; ++i) {
        even += sum_of_pair(units + i * kTile);
        odds += sum_of_pair(units + (kTile + i) * kTile);
      }
    }
    if (sums != nullptr) _mm512_storeu_si512(sums + c, Layout<2>::joined(even, odds));
  }
}

}  // namespace
}  // namespace stopgo

using namespace stopgo;

extern "C" void stopgo_projection_forward(int64_t rows, int64_t width, int64_t depth, const void* x, int64_t x_stride,
                                          const void* w, const void* bias, void* y, int64_t y_stride) {
  const auto *from = static_cast<Values>(x), *weight = static_cast<Values>(w), *shift = static_cast<Values>(bias);
  auto* to = static_cast<BFloat16*>(y);
  if (rows <= kFewRows)
    return forward_few(rows, width, depth, from, x_stride, weight, TurnedOutput<PlainLine>{{to}, y_stride, shift});
  const LeftRows left(from, x_stride, rows, depth, tail_scratch(depth));
  product({rows, width, depth}, left, Transposed{weight, depth},
          Output<Order::kPlain>{to, y_stride, shift, false, false});
}

extern "C" void stopgo_projection_gelu_forward(int64_t rows, int64_t width, int64_t depth, const void* x,
                                               int64_t x_stride, const void* w, const void* bias, void* inner, void* y) {
  const auto *from = static_cast<Values>(x), *weight = static_cast<Values>(w);
  const ActivatedLine line = {static_cast<BFloat16*>(inner), static_cast<Values>(bias), static_cast<BFloat16*>(y),
                              gelu_for(BFloat16{})};
  if (rows <= kFewRows)
    return forward_few(rows, width, depth, from, x_stride, weight, TurnedOutput<ActivatedLine>{line, width, nullptr});
  product({rows, width, depth}, LeftRows(from, x_stride, rows, depth, tail_scratch(depth)), Transposed{weight, depth},
          ActivatedOutput{line, width});
}

extern "C" void stopgo_projection_gelu_gradient(int64_t rows, int64_t width, int64_t depth, const void* dy,
                                                int64_t dy_stride, const void* w, const void* bias, void* inner,
                                                void* dinner) {
  const LeftRows left(static_cast<Values>(dy), dy_stride, rows, depth, tail_scratch(depth));
  product({rows, width, depth}, left, Paired{static_cast<Values>(w), width, depth},
          GeluGradientOutput{static_cast<BFloat16*>(dinner), static_cast<BFloat16*>(inner), static_cast<Values>(bias),
                             width, gelu_for(BFloat16{})});
}

extern "C" void stopgo_projection_input_gradient(int64_t rows, int64_t width, int64_t depth, const void* dy,
                                                 int64_t dy_stride, const void* w, void* dx, int64_t dx_stride,
                                                 int32_t add) {
  const LeftRows left(static_cast<Values>(dy), dy_stride, rows, depth, tail_scratch(depth));
  product({rows, width, depth}, left, Paired{static_cast<Values>(w), width, depth},
          Output<Order::kEvenFirst>{static_cast<BFloat16*>(dx), dx_stride, nullptr, add != 0, false});
}

extern "C" void stopgo_projection_weight_gradient(int64_t rows, int64_t width, int64_t depth, const void* dy,
                                                  int64_t dy_stride, const void* x, int64_t x_stride, void* dw,
                                                  void* dbias) {
  const int64_t steps = round_up(rows, kDeep);
  const int64_t stride = steps + (steps / kDeep % 2 ? 0 : kDeep);  // an odd number of cache lines
  static thread_local Scratch scratch;
  auto* turned = scratch.get<BFloat16>(width * stride);
  turn(rows, steps, width, static_cast<Values>(dy), dy_stride, turned, stride,
       static_cast<BFloat16*>(dbias));
  const bool streaming = reinterpret_cast<uintptr_t>(dw) % 64 == 0;  // past the caches: the optimizer reads it much later
  const Cut cut = {width, depth, steps};
  const LeftRows left(turned, stride, width, steps, nullptr);
  const Paired source = {static_cast<Values>(x), x_stride, rows};
  const Output<Order::kEvenFirst> out = {static_cast<BFloat16*>(dw), depth, nullptr, false, streaming};
  if (steps > 3 * kPart / 2)
    deep_product(cut, left, source, out);
  else
    wide_product(cut, left, source, out);
}

#endif
