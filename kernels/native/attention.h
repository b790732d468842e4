// Attention of one (direction, item, head): what a thread does alone, in scratch memory of its own.
//
// Scores are held transposed, [keys][queries]: a vector holds one key's scores for kLanes queries. So the softmax needs
// no sums over lanes, and dropout counters, whose row is the query, differ from lane to lane in nothing else: a draw
// decides eight keys for each query of a vector. Where a product needs the queries outside, `transpose` turns them.
#pragma once
#include <omp.h>

#include <algorithm>
#include <cmath>
#include <deque>

#include "elementary.h"
#include "pack.h"
#include "parallel.h"
#include "philox.h"
#include "stopgo.h"

namespace stopgo {

constexpr int64_t kTile = 64;          // columns of a dropout tile: kernels/dropout.py
constexpr int kHeadShift = 16;         // the row of a dropout counter is (head << kHeadShift) + query
constexpr int64_t kQueries = 64;       // queries of a block
constexpr int64_t kChunk = 512;        // queries whose probabilities are held at a time, in backward
constexpr int64_t kStoreColumns = 64;  // of a product between its sums and the tensor that they go to
static_assert(kChunk % kQueries == 0 && kQueries % kPad == 0, "blocks of whole vectors and tiles");

// e^(x * scale) for x <= 0. What becomes bfloat16 pairs is within 3e-6 of itself, the rest as near as `exp`.
template <class Math>
STOPGO_INLINE Floats exponential(Floats x, float scale) {
  if constexpr (Math::kPerUnit == 1) {
    return exp(x * scale);
  } else {
#if defined(__AVX512BF16__)
    const Floats y = x * (scale * 1.44269504f);
    const Floats n = _mm512_roundscale_ps(y, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC), r = y - n;
    const Floats p = ((9.582853038e-03f * r + 5.590642468e-02f) * r + 2.402409861e-01f) * r + 6.931241934e-01f;
    return _mm512_scalef_ps(p * r + 1.0f, n);
#endif
  }
}

// --- Dropout of kLanes queries at once -------------------------------------------------------------------------------

// The four words of one column block for kLanes consecutive queries: eight 16-bit lanes each.
struct QueryWords {
  Words word[4];
};

// The draws of one item. A class for rows that vary from lane to lane, as philox.h has one for blocks that do.
class QueryDraws {
 public:
  QueryDraws(const Site& site, int64_t item_key) : threshold_(site.threshold) {
    for (uint32_t i = 0; i < philox::kRounds; ++i) {
      k0_[i] = site.seed + i * philox::kW0;
      k1_[i] = site.step + i * philox::kW1;
    }
    const uint64_t p0 = static_cast<uint64_t>(static_cast<uint32_t>(item_key)) * philox::kM0;
    c2_ = static_cast<uint32_t>(p0 >> 32) ^ site.site ^ static_cast<uint32_t>(k1_[0]);
    c3_ = static_cast<uint32_t>(p0);
    for (int i = 0; i < kLanes / 2; ++i) even_[i] = 2 * static_cast<uint64_t>(i);
  }

  uint32_t threshold() const { return threshold_; }

  // Block `block` of the rows row, row + 1, ...
  STOPGO_INLINE QueryWords draw(uint32_t row, uint32_t block) const {
    const philox::Longs even = even_ + static_cast<uint64_t>(row);
    const philox::Draw a = draw(even, block), b = draw(even + 1, block);
    using philox::interleave;
    return {{interleave(a.c0, b.c0), interleave(a.c1, b.c1), interleave(a.c2, b.c2), interleave(a.c3, b.c3)}};
  }

 private:
  // Ten rounds; of the first three rounds' six products, four are the same for all queries.
  STOPGO_INLINE philox::Draw draw(philox::Longs row, uint64_t block) const {
    using namespace philox;
    const uint64_t low = 0xFFFFFFFFu;
    const uint64_t by_block = block * kM1;
    const Longs c0 = row ^ ((by_block >> 32) ^ k0_[0]);  // round 1
    const Longs p0 = product(c0, kM0);                   // round 2
    const uint64_t p1 = c2_ * kM1, second_c0 = ((p1 >> 32) ^ by_block ^ k0_[1]) & low;
    const Longs second_c2 = (p0 >> 32) ^ (c3_ ^ k1_[1]);
    const uint64_t q0 = second_c0 * kM0;  // round 3
    const Longs q1 = product(second_c2, kM1);
    Draw d;
    d.c0 = (q1 >> 32) ^ ((p1 & low) ^ k0_[2]);
    d.c1 = q1;
    d.c2 = p0 ^ ((q0 >> 32) ^ k1_[2]);
    d.c3 = Longs{} + q0;
#pragma GCC unroll 8
    for (int round = 3; round < kRounds; ++round) {
      const Longs s0 = product(d.c0, kM0), s1 = product(d.c2, kM1);
      d.c0 = (s1 >> 32) ^ d.c1 ^ k0_[round];
      d.c1 = s1;
      d.c2 = (s0 >> 32) ^ d.c3 ^ k1_[round];
      d.c3 = s0;
    }
    return d;
  }

  // 64 bits wide, so that a vector instruction can broadcast them from memory. c2_, c3_: after round 1.
  uint64_t k0_[philox::kRounds], k1_[philox::kRounds], c2_, c3_;
  philox::Longs even_;
  uint32_t threshold_;
};

#if defined(__AVX512BW__)
typedef __mmask16 Kept;
#else
typedef Ints Kept;
#endif

// Whether lane `lane` (0..7) of a draw keeps.
STOPGO_INLINE Kept kept(const QueryWords& words, int lane, uint32_t threshold) {
  const Words word = words.word[lane >> 1], drawn = lane & 1 ? word >> 16 : word & 0xFFFFu;
#if defined(__AVX512BW__)
  return _mm512_cmpge_epu32_mask(bits_as<__m512i>(drawn), _mm512_set1_epi32(static_cast<int>(threshold)));
#else
  return bits_as<Ints>(drawn) >= static_cast<int32_t>(threshold);
#endif
}

STOPGO_INLINE Floats zero_unless(Kept keep, Floats v) {
#if defined(__AVX512BW__)
  return _mm512_maskz_mov_ps(keep, v);
#else
  return bits_as<Floats>(bits_as<Ints>(v) & keep);
#endif
}

STOPGO_INLINE Floats minus_unless(Kept keep, Floats v) {
#if defined(__AVX512BW__)
  return _mm512_mask_sub_ps(v, _knot_mask16(keep), Floats{}, v);
#else
  return keep ? v : -v;
#endif
}

// f(key, has_next, words of key, words of key + 1, lane) for every second one of `keys` keys, in the order in which
// draws serve: each for eight keys. `row`: of the first query's counter.
template <bool kDrop, class F>
STOPGO_INLINE void for_key_pairs(const QueryDraws& draws, int64_t row, int64_t keys, F&& f) {
  for (int64_t tile = 0; tile < keys; tile += kTile)
    for (int64_t first = tile; first < std::min(tile + 8, keys); first += 2) {
      QueryWords words{}, next{};
      if constexpr (kDrop) {
        const auto block = static_cast<uint32_t>(tile / 8 + first - tile);
        words = draws.draw(static_cast<uint32_t>(row), block);
        next = draws.draw(static_cast<uint32_t>(row), block + 1);
      }
#pragma GCC unroll 8
      for (int lane = 0; lane < 8; ++lane) {
        const int64_t key = first + 8 * lane;
        if (key >= keys) break;
        f(key, key + 1 < keys, words, next, lane);
      }
    }
}

// --- One task --------------------------------------------------------------------------------------------------------

template <class T>
struct Head {
  int64_t queries, keys, width;
  float scale;
  Rows<const T> q, k, v;
  Rows<T> out;
  float* lse;  // of query 0; may be null
  int64_t lse_stride;
  Site site;
  int64_t item_key, first_row;  // of the dropout counters
  Rows<const T> dout;           // these and below in backward only
  Rows<T> dq, dk, dv;

  Head(const StopgoDirection& d, int64_t item, int64_t head, int64_t heads, int64_t head_dim)
      : queries(d.cu_q[item + 1] - d.cu_q[item]),
        keys(d.cu_k[item + 1] - d.cu_k[item]),
        width(head_dim),
        scale(1.0f / std::sqrt(static_cast<float>(head_dim))),
        lse(d.lse == nullptr ? nullptr : d.lse + d.cu_q[item] * heads + head),
        lse_stride(heads),
        site{d.seed, d.step, d.site, d.threshold},
        item_key(d.item_key[item]),
        first_row(head << kHeadShift) {
    const int64_t first_q = d.cu_q[item], first_k = d.cu_k[item], column = head * head_dim;
    const auto place = [=](auto& rows, auto* x, int64_t first, int64_t stride) {
      if (x != nullptr) rows = {static_cast<decltype(rows.at)>(x) + first * stride + column, stride};
    };
    place(q, d.q, first_q, d.q_stride);
    place(k, d.k, first_k, d.k_stride);
    place(v, d.v, first_k, d.v_stride);
    place(out, d.out, first_q, d.out_stride);
    place(dout, d.dout, first_q, d.dout_stride);
    place(dq, d.dq, first_q, d.dq_stride);
    place(dk, d.dk, first_k, d.dk_stride);
    place(dv, d.dv, first_k, d.dv_stride);
  }
};

// Of one thread; every piece grows to the largest task and stays.
class Workspace {
 public:
  void start() { used_ = 0; }
  Units units(int64_t rows, int64_t columns) { return matrix<Units, uint32_t>(rows, columns); }
  Sums sums(int64_t rows, int64_t columns) { return matrix<Sums, float>(rows, columns); }

 private:
  template <class Matrix, class T>
  Matrix matrix(int64_t rows, int64_t columns) {
    if (used_ == pieces_.size()) pieces_.emplace_back();
    const int64_t ld = ld_of(columns);
    return {pieces_[used_++].get<T>(round_up(rows, kPad) * ld), ld};
  }

  std::deque<Scratch> pieces_;
  size_t used_ = 0;
};

inline Workspace& own_workspace() {
  thread_local Workspace workspace;
  workspace.start();
  return workspace;
}

// The transpose of x by rows, and x by depth if wanted. `strip` holds kPad rows: near enough to be read again at once.
template <class Math, class T>
void pack_turned(Rows<const T> x, int64_t rows, int64_t width, Units strip, Units turned, Units by_depth) {
  using Form = Layout<Math::kPerUnit>;
  const int64_t depth = depth_of<Math>(width);
  for (int64_t r = 0; r < rows; r += kPad) {
    const int64_t n = std::min(kPad, rows - r);
    Form::pack(x.from(r), n, width, strip, by_depth.at ? by_depth.from(r / Math::kPerUnit, 0) : kNowhere);
    zero_rows(strip, n, kPad, depth);
    transpose(strip, n, depth, turned.from(0, r));
  }
}

// x[r] = factor(r) times row r of a b, in blocks whose sums stay in the nearest cache, as b does for a block's columns.
template <class Math, class T, class Factor>
void product_to_rows(int64_t rows, int64_t width, int64_t depth, Units a, Units b, Sums block, Rows<T> x,
                     Factor&& factor) {
  using Form = Layout<Math::kPerUnit>;
  const int64_t columns = Form::columns(width);
  for (int64_t c = 0; c < columns; c += kStoreColumns)
    for (int64_t first = 0; first < rows; first += Math::kStoreRows) {
      const int64_t n = std::min(Math::kStoreRows, rows - first), values = std::min(kStoreColumns, width - c);
      Math::product(n, std::min(kStoreColumns, columns - c), depth, a.from(first, 0), b.from(0, c), block);
      for (int64_t r = first; r < first + n; ++r)
        Form::unpack(block.row(r - first), factor(r), values, x.row(r) + c, width);
    }
}

STOPGO_INLINE Floats column_largest(Sums s, int64_t rows, int64_t column) {
  Floats even = load(s.row(0) + column), odd = load(s.row(rows - 1) + column);
  for (int64_t r = 1; r + 1 < rows; r += 2) {
    even = maximum(even, load(s.row(r) + column));
    odd = maximum(odd, load(s.row(r + 1) + column));
  }
  return maximum(even, odd);
}

STOPGO_INLINE Floats all_of(const Floats (&x)[4]) { return (x[0] + x[1]) + (x[2] + x[3]); }

// --- Forward ---------------------------------------------------------------------------------------------------------

// From the scores of kLanes queries, [keys][queries] from column `query` on: the exponentials of how far they are below
// the largest, dropped and unscaled, by depth over the keys; their sums before dropout, and the logarithms of the whole
// sums.
template <class Math, bool kDrop>
void softmax(Sums scores, int64_t keys, int64_t query, float scale, const QueryDraws& draws, int64_t row, Units out,
             float* total, float* lse) {
  const Floats top = column_largest(scores, keys, query);
  const auto of_key = [=](int64_t key) STOPGO_INLINE_LAMBDA {
    return exponential<Math>(load(scores.row(key) + query) - top, scale);
  };
  Floats sums[4]{};
  for_key_pairs<kDrop>(draws, row, keys,
                       [&](int64_t key, bool has_next, const QueryWords& words, const QueryWords& next_words, int lane)
                           STOPGO_INLINE_LAMBDA {
    Floats e = of_key(key), next = has_next ? of_key(key + 1) : Floats{};
    sums[lane % 4] += e + next;
    if constexpr (kDrop) {
      e = zero_unless(kept(words, lane, draws.threshold()), e);
      next = zero_unless(kept(next_words, lane, draws.threshold()), next);
    }
    Layout<Math::kPerUnit>::put_by_depth(out, key, query, e, next);
  });
  const Floats sum = all_of(sums);
  store(total + query, sum);
  store(lse + query, top * scale + log(sum));
}

template <class T, class Math>
void attention_forward(const Head<T>& h) {
  using Form = Layout<Math::kPerUnit>;
  const int64_t head_depth = depth_of<Math>(h.width), key_depth = depth_of<Math>(h.keys);
  const int64_t block = std::min(kQueries, round_up(h.queries, kPad)), columns = Form::columns(h.width);
  Workspace& w = own_workspace();
  const Units k = w.units(h.keys, head_depth), v = w.units(key_depth, columns);
  const Units strip = w.units(kPad, head_depth), q_turned = w.units(head_depth, block);
  const Sums scores = w.sums(h.keys, block), sums = w.sums(Math::kStoreRows, kStoreColumns);
  const Units p_turned = w.units(key_depth, block), p = w.units(block, key_depth);
  alignas(64) float total[kQueries], lse[kQueries];
  const float keep_scale = h.site.scale();
  const QueryDraws draws(h.site, h.item_key);
  const auto softmax_part = h.site.threshold == 0 ? softmax<Math, false> : softmax<Math, true>;

  Form::pack(h.k, h.keys, h.width, k, kNowhere);
  Form::pack(h.v, h.keys, h.width, kNowhere, v);
  zero_rows(v, units_of<Math>(h.keys), key_depth, columns);
  zero_rows(p_turned, units_of<Math>(h.keys), key_depth, block);
  for (int64_t first = 0; first < h.queries; first += kQueries) {
    const int64_t n = std::min(kQueries, h.queries - first);
    pack_turned<Math>(h.q.from(first), n, h.width, strip, q_turned, kNowhere);
    Math::product(h.keys, n, head_depth, k, q_turned, scores);
    for (int64_t i = 0; i < n; i += kLanes)
      softmax_part(scores, h.keys, i, h.scale, draws, h.first_row + first + i, p_turned, total, lse);
    transpose(p_turned, key_depth, n, p);
    product_to_rows<Math>(n, h.width, key_depth, p, v, sums, h.out.from(first),
                          [&](int64_t query) { return keep_scale / total[query]; });
    if (h.lse != nullptr)
      for (int64_t i = 0; i < n; ++i) h.lse[(first + i) * h.lse_stride] = lse[i];
  }
}

// --- Backward --------------------------------------------------------------------------------------------------------

// A block's scores and the gradients of its dropped probabilities, both [keys][queries], and what becomes of them.
struct Scores {
  Sums s, dp;
  Units p, ds;       // dropped probabilities, unscaled, and the gradients of the scaled scores, both by rows
  Units ds_by_depth;  // the same, over the keys
};

// From the columns `query` to query + kLanes of s (which it overwrites) and dp, all the rest. It is made from the
// scores again, with the sums of this very pass: so what should cancel does, and a lone key's gradient is exactly 0.
template <class Math, bool kDrop>
void softmax_backward(const Scores& b, int64_t keys, int64_t query, float scale, float keep_scale,
                      const QueryDraws& draws, int64_t row) {
  using Form = Layout<Math::kPerUnit>;
  const Floats top = column_largest(b.s, keys, query);
  const auto gradient = [&](int64_t key) STOPGO_INLINE_LAMBDA {
    const Floats g = load(b.dp.row(key) + query);
    return kDrop ? g * keep_scale : g;
  };
  // Between the passes s holds the exponentials, with a minus where they are dropped.
  const auto dropped = [](Floats e) STOPGO_INLINE_LAMBDA { return kDrop ? maximum(e, Floats{}) : e; };
  const auto undropped = [](Floats e) STOPGO_INLINE_LAMBDA { return kDrop ? absolute(e) : e; };

  Floats sums[4]{}, weighted[4]{};
  const auto add = [&](int64_t key, const QueryWords& words, int lane) STOPGO_INLINE_LAMBDA {
    float* at = b.s.row(key) + query;
    Floats e = exponential<Math>(load(at) - top, scale);
    sums[lane % 4] += e;
    if constexpr (kDrop) e = minus_unless(kept(words, lane, draws.threshold()), e);
    weighted[lane % 4] += dropped(e) * gradient(key);
    store(at, e);
  };
  for_key_pairs<kDrop>(draws, row, keys,
                       [&](int64_t key, bool has_next, const QueryWords& words, const QueryWords& next_words, int lane)
                           STOPGO_INLINE_LAMBDA {
    add(key, words, lane);
    if (has_next) add(key + 1, next_words, lane);
  });

  const Floats sum = all_of(sums), inverse = 1.0f / sum, delta = all_of(weighted) / sum;
  for (int64_t key = 0; key < keys; key += 2) {
    Floats p[2]{}, ds[2]{};
    for (int i = 0; i < 2 && key + i < keys; ++i) {
      const Floats e = load(b.s.row(key + i) + query), g = gradient(key + i);
      p[i] = dropped(e) * inverse;
      ds[i] = kDrop ? p[i] * g - undropped(e) * inverse * delta : p[i] * (g - delta);
    }
    Form::put_by_rows(b.p, key, query, p[0], p[1]);
    Form::put_by_rows(b.ds, key, query, ds[0], ds[1]);
    Form::put_by_depth(b.ds_by_depth, key, query, ds[0], ds[1]);
  }
}

template <class T, class Math>
void attention_backward(const Head<T>& h) {
  using Form = Layout<Math::kPerUnit>;
  const int64_t head_depth = depth_of<Math>(h.width), key_depth = depth_of<Math>(h.keys);
  const int64_t chunk = std::min(kChunk, round_up(h.queries, kPad)), columns = Form::columns(h.width);
  const int64_t block = std::min(kQueries, chunk), chunk_depth = depth_of<Math>(chunk);
  const bool chunked = h.queries > kChunk;
  Workspace& w = own_workspace();
  const Units k = w.units(h.keys, head_depth), v = w.units(h.keys, head_depth), k_depth = w.units(key_depth, columns);
  const Units strip = w.units(kPad, head_depth);
  const Units q_turned = w.units(head_depth, block), dout_turned = w.units(head_depth, block);
  const Units q_depth = w.units(chunk_depth, columns), dout_depth = w.units(chunk_depth, columns);
  const Sums s = w.sums(h.keys, block), dp = w.sums(h.keys, block), sums = w.sums(Math::kStoreRows, kStoreColumns);
  const Units p = w.units(h.keys, chunk_depth), ds = w.units(h.keys, chunk_depth);
  const Units ds_depth = w.units(key_depth, block), ds_turned = w.units(block, key_depth);
  const Sums dk = w.sums(chunked ? h.keys : 0, columns), dv = w.sums(chunked ? h.keys : 0, columns);
  const float keep_scale = h.site.scale();
  const QueryDraws draws(h.site, h.item_key);
  const auto softmax_part = h.site.threshold == 0 ? softmax_backward<Math, false> : softmax_backward<Math, true>;

  Form::pack(h.k, h.keys, h.width, k, k_depth);
  Form::pack(h.v, h.keys, h.width, v, kNowhere);
  zero_rows(k_depth, units_of<Math>(h.keys), key_depth, columns);
  zero_rows(ds_depth, units_of<Math>(h.keys), key_depth, block);
  for (int64_t first = 0; first < h.queries; first += kChunk) {
    const int64_t in_chunk = std::min(kChunk, h.queries - first), depth = depth_of<Math>(in_chunk);
    const int64_t written = round_up(in_chunk, kPad) / Math::kPerUnit;  // of a row of p and ds, by the blocks below
    for (const Units x : {p, ds}) zero_rows(x.from(0, written), 0, h.keys, depth - written);
    for (const Units x : {q_depth, dout_depth}) zero_rows(x, units_of<Math>(in_chunk), depth, columns);
    for (int64_t start = 0; start < in_chunk; start += kQueries) {
      const int64_t query = first + start, n = std::min(kQueries, in_chunk - start), unit = start / Math::kPerUnit;
      pack_turned<Math>(h.q.from(query), n, h.width, strip, q_turned, q_depth.from(unit, 0));
      pack_turned<Math>(h.dout.from(query), n, h.width, strip, dout_turned, dout_depth.from(unit, 0));
      Math::product(h.keys, n, head_depth, k, q_turned, s);
      Math::product(h.keys, n, head_depth, v, dout_turned, dp);
      const Scores scores{s, dp, p.from(0, unit), ds.from(0, unit), ds_depth};
      for (int64_t i = 0; i < n; i += kLanes)
        softmax_part(scores, h.keys, i, h.scale, keep_scale, draws, h.first_row + query + i);
      transpose(ds_depth, key_depth, n, ds_turned);
      product_to_rows<Math>(n, h.width, key_depth, ds_turned, k_depth, sums, h.dq.from(query),
                            [&](int64_t) { return h.scale; });
    }
    if (chunked) {
      Math::product(h.keys, columns, depth, p, dout_depth, dv, first > 0);
      Math::product(h.keys, columns, depth, ds, q_depth, dk, first > 0);
    } else {
      product_to_rows<Math>(h.keys, h.width, depth, p, dout_depth, sums, h.dv, [=](int64_t) { return keep_scale; });
      product_to_rows<Math>(h.keys, h.width, depth, ds, q_depth, sums, h.dk, [&](int64_t) { return h.scale; });
    }
  }
  if (!chunked) return;
  for (int64_t r = 0; r < h.keys; ++r) {
    Form::unpack(dv.row(r), keep_scale, h.width, h.dv.row(r), h.width);
    Form::unpack(dk.row(r), h.scale, h.width, h.dk.row(r), h.width);
  }
}

// --- All tasks of a call ---------------------------------------------------------------------------------------------

// run(head) for every direction, item and head, in parallel where that is worth it. A thread takes neighbouring heads
// together: they lie in the same pages, and `pack` asks for the next one's rows ahead.
template <class T, class Math>
void for_heads(int32_t n_directions, const StopgoDirection* directions, int64_t n_items, int64_t heads,
               int64_t head_dim, void (*run)(const Head<T>&)) {
  const int64_t tasks = n_directions * n_items * heads;
  int64_t rows = 0;
  for (int32_t i = 0; i < n_directions; ++i) rows += directions[i].cu_q[n_items] + directions[i].cu_k[n_items];
  const int64_t together = std::clamp<int64_t>(tasks / (4 * omp_get_max_threads()), 1, heads);
#pragma omp parallel if (tasks > 1 && rows * heads * head_dim > kWorthThreads)
  {
    [[maybe_unused]] const typename Math::Session session;
#pragma omp for schedule(dynamic, together)
    for (int64_t task = 0; task < tasks; ++task) {
      const int64_t head = task % heads, item = task / heads % n_items, direction = task / heads / n_items;
      run(Head<T>(directions[direction], item, head, heads, head_dim));
    }
  }
}

}  // namespace stopgo
