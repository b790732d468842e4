// Attention against float64, for every arithmetic that this instruction set has, and the products inside it.
#include <sys/mman.h>
#include <unistd.h>

#include <numeric>

#include "../../kernels/native/attention.h"
#include "check.h"

using namespace check;

namespace {

using Doubles = std::vector<double>;
using Lengths = std::vector<int64_t>;

// Memory whose end is the end of the readable world: masked loads and tiles are beyond what a sanitizer sees.
class Guarded {
 public:
  explicit Guarded(size_t bytes) {
    const auto page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t readable = (bytes + page - 1) / page * page;
    mapped_ = readable + page;
    base_ = static_cast<char*>(mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (base_ == MAP_FAILED || mprotect(base_ + readable, page, PROT_NONE) != 0) std::abort();
    at_ = base_ + readable - bytes;
  }
  ~Guarded() { munmap(base_, mapped_); }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;

  char* at() const { return at_; }

 private:
  char *base_, *at_;
  size_t mapped_;
};

// Rows of `width` values, `gap` more of something else between them, nothing behind the last.
class Tensor {
 public:
  Tensor(const Values& values, int64_t width, int64_t gap)
      : dtype_(values.dtype()),
        rows_(values.size() / width),
        width_(width),
        stride_(width + gap),
        size_(format_of(dtype_).size),
        memory_(static_cast<size_t>(((rows_ - 1) * stride_ + width) * size_)) {
    std::memset(memory_.at(), kGap, static_cast<size_t>(((rows_ - 1) * stride_ + width) * size_));
    for (int64_t r = 0; r < rows_; ++r)
      std::memcpy(row(r), bytes(values.data(), r), static_cast<size_t>(width_ * size_));
  }

  void* data() const { return memory_.at(); }
  int64_t stride() const { return stride_; }

  Values values() const {
    Values found(dtype_, rows_ * width_);
    for (int64_t r = 0; r < rows_; ++r)
      std::memcpy(const_cast<char*>(bytes(found.data(), r)), row(r), static_cast<size_t>(width_ * size_));
    return found;
  }

  bool gaps_are_whole() const {
    for (int64_t r = 0; r + 1 < rows_; ++r)
      for (int64_t i = width_ * size_; i < stride_ * size_; ++i)
        if (row(r)[i] != kGap) return false;
    return true;
  }

 private:
  static constexpr char kGap = 0x7F;  // NaN in every dtype, so that reading one shows

  char* row(int64_t r) const { return memory_.at() + r * stride_ * size_; }
  const char* bytes(const void* data, int64_t r) const { return static_cast<const char*>(data) + r * width_ * size_; }

  int32_t dtype_;
  int64_t rows_, width_, stride_, size_;
  Guarded memory_;
};

std::vector<int32_t> starts_of(const Lengths& lengths) {
  std::vector<int32_t> starts(1, 0);
  for (int64_t length : lengths) starts.push_back(starts.back() + static_cast<int32_t>(length));
  return starts;
}

struct Shape {
  int32_t dtype;
  Lengths q, k;
  int64_t heads, head_dim, gap;
  Site site;

  int64_t width() const { return heads * head_dim; }
  int64_t q_rows() const { return std::accumulate(q.begin(), q.end(), int64_t{0}); }
  int64_t k_rows() const { return std::accumulate(k.begin(), k.end(), int64_t{0}); }
};

// One direction, its inputs and its results.
struct Direction {
  Shape shape;
  Values q_values, k_values, v_values, dout_values;
  Tensor q, k, v, dout, out, dq, dk, dv;
  std::vector<float> lse;
  std::vector<int32_t> q_starts, k_starts;
  std::vector<int64_t> key;

  Direction(Random& random, const Shape& s)
      : shape(s),
        q_values(random.values(s.dtype, s.q_rows() * s.width(), 1.5)),
        k_values(random.values(s.dtype, s.k_rows() * s.width())),
        v_values(random.values(s.dtype, s.k_rows() * s.width())),
        dout_values(random.values(s.dtype, s.q_rows() * s.width())),
        q(q_values, s.width(), s.gap),
        k(k_values, s.width(), s.gap),
        v(v_values, s.width(), 2 * s.gap),
        dout(dout_values, s.width(), s.gap),
        out(q_values, s.width(), s.gap),
        dq(q_values, s.width(), 2 * s.gap),
        dk(k_values, s.width(), s.gap),
        dv(k_values, s.width(), s.gap),
        lse(static_cast<size_t>(s.q_rows() * s.heads)),
        q_starts(starts_of(s.q)),
        k_starts(starts_of(s.k)),
        key(random.keys(static_cast<int64_t>(s.q.size()))) {}

  StopgoDirection call() {
    StopgoDirection d{};
    d.q = q.data(), d.k = k.data(), d.v = v.data();
    d.q_stride = q.stride(), d.k_stride = k.stride(), d.v_stride = v.stride();
    d.cu_q = q_starts.data(), d.cu_k = k_starts.data(), d.item_key = key.data();
    d.seed = shape.site.seed, d.step = shape.site.step, d.site = shape.site.site, d.threshold = shape.site.threshold;
    d.out = out.data(), d.out_stride = out.stride(), d.lse = lse.data();
    d.dout = dout.data(), d.dout_stride = dout.stride();
    d.dq = dq.data(), d.dk = dk.data(), d.dv = dv.data();
    d.dq_stride = dq.stride(), d.dk_stride = dk.stride(), d.dv_stride = dv.stride();
    return d;
  }

  std::vector<Values> results() const { return {out.values(), dq.values(), dk.values(), dv.values()}; }
};

struct Truth {
  Doubles out, dq, dk, dv, lse;
};

// Item by item, head by head, value by value.
Truth truth_of(const Direction& d) {
  const Shape& s = d.shape;
  const auto zeros = [](int64_t n) { return Doubles(static_cast<size_t>(n)); };
  const int64_t width = s.width();
  Truth t{zeros(s.q_rows() * width), zeros(s.q_rows() * width), zeros(s.k_rows() * width), zeros(s.k_rows() * width),
          zeros(s.q_rows() * s.heads)};
  const double scale = 1 / std::sqrt(static_cast<double>(s.head_dim));
  for (size_t item = 0; item < s.q.size(); ++item)
    for (int64_t head = 0; head < s.heads; ++head)
      for (int64_t i = 0; i < s.q[item]; ++i) {
        const int64_t q = (d.q_starts[item] + i) * width + head * s.head_dim, keys = s.k[item];
        const auto key_at = [&](int64_t j) { return (d.k_starts[item] + j) * width + head * s.head_dim; };
        Doubles p = zeros(keys), dp = zeros(keys), keep = zeros(keys);
        double top = -INFINITY, sum = 0, delta = 0;
        for (int64_t j = 0; j < keys; ++j) {
          double& score = p[static_cast<size_t>(j)];
          for (int64_t c = 0; c < s.head_dim; ++c) {
            score += d.q_values[q + c] * d.k_values[key_at(j) + c] * scale;
            dp[static_cast<size_t>(j)] += d.dout_values[q + c] * d.v_values[key_at(j) + c];
          }
          top = std::max(top, score);
          const bool is_kept = s.site.threshold == 0 || kept(s.site, d.key[item], (head << 16) + i, j, 64);
          keep[static_cast<size_t>(j)] = is_kept ? s.site.scale() : 0;
        }
        for (double& x : p) sum += x = std::exp(x - top);
        t.lse[static_cast<size_t>((d.q_starts[item] + i) * s.heads + head)] = top + std::log(sum);
        for (size_t j = 0; j < p.size(); ++j) {
          p[j] /= sum;
          delta += p[j] * keep[j] * dp[j];
        }
        for (int64_t j = 0; j < keys; ++j) {
          const auto n = static_cast<size_t>(j);
          const double dropped = p[n] * keep[n], ds = p[n] * (keep[n] * dp[n] - delta) * scale;
          for (int64_t c = 0; c < s.head_dim; ++c) {
            const auto at = static_cast<size_t>(q + c), key = static_cast<size_t>(key_at(j) + c);
            t.out[at] += dropped * d.v_values[key_at(j) + c];
            t.dv[key] += dropped * d.dout_values[q + c];
            t.dq[at] += ds * d.k_values[key_at(j) + c];
            t.dk[key] += ds * d.q_values[q + c];
          }
        }
      }
  return t;
}

double rms(const Doubles& x) {
  double sum = 0;
  for (double value : x) sum += value * value;
  return std::sqrt(sum / static_cast<double>(x.size()));
}

// The error is at most `allowed` times the size of the result, both root mean squares.
void expect_near(const std::string& what, const Values& found, const Doubles& truth, double allowed) {
  Doubles error(truth.size());
  for (size_t i = 0; i < truth.size(); ++i) error[i] = found[static_cast<int64_t>(i)] - truth[i];
  const double off = rms(error), bound = allowed * rms(truth);
  expect(off <= bound, text(what, " is off by ", off, ", allowed ", bound));
}

using Call = void (*)(int32_t, int32_t, const StopgoDirection*, int64_t, int64_t, int64_t);

// The interface, and the arithmetics that it chooses from elsewhere.
struct Implementation {
  const char* name;
  Call forward, backward;
};

template <class Math>
Implementation of_pairs(const char* name) {
  using stopgo::BFloat16;
  return {name,
          [](int32_t, int32_t n, const StopgoDirection* d, int64_t items, int64_t heads, int64_t head_dim) {
            stopgo::for_heads<BFloat16, Math>(n, d, items, heads, head_dim, stopgo::attention_forward<BFloat16, Math>);
          },
          [](int32_t, int32_t n, const StopgoDirection* d, int64_t items, int64_t heads, int64_t head_dim) {
            stopgo::for_heads<BFloat16, Math>(n, d, items, heads, head_dim, stopgo::attention_backward<BFloat16, Math>);
          }};
}

std::vector<Implementation> implementations(int32_t dtype) {
  std::vector<Implementation> all{{"interface", stopgo_attention_forward, stopgo_attention_backward}};
  if (dtype == kBFloat16) {
#if defined(__AMX_BF16__)
    all.push_back(of_pairs<stopgo::TileMath>("tiles"));
#endif
#if defined(__AVX512BF16__)
    all.push_back(of_pairs<stopgo::PairMath>("pairs"));
#endif
    all.push_back(of_pairs<stopgo::SingleMath>("singles"));
  }
  return all;
}

void run(const Implementation& by, std::vector<Direction*> directions) {
  std::vector<StopgoDirection> calls;
  for (Direction* d : directions) calls.push_back(d->call());
  const Shape& s = directions[0]->shape;
  const auto n = static_cast<int32_t>(calls.size());
  const auto items = static_cast<int64_t>(s.q.size());
  by.forward(s.dtype, n, calls.data(), items, s.heads, s.head_dim);
  by.backward(s.dtype, n, calls.data(), items, s.heads, s.head_dim);
}

// Probabilities and score gradients become bfloat16 on their way, once, and so does the result.
double allowed_of(int32_t dtype) { return dtype == kFloat32 ? 2e-6 : dtype == kBFloat16 ? 5e-3 : 5e-4; }

void expect_right(const Direction& d) {
  const Truth t = truth_of(d);
  const double allowed = allowed_of(d.shape.dtype);
  expect_near("out", d.out.values(), t.out, allowed);
  expect_near("dq", d.dq.values(), t.dq, allowed);
  expect_near("dk", d.dk.values(), t.dk, allowed);
  expect_near("dv", d.dv.values(), t.dv, allowed);
  Values lse(kFloat32, static_cast<int64_t>(d.lse.size()));
  for (size_t i = 0; i < d.lse.size(); ++i) lse.set(static_cast<int64_t>(i), d.lse[i]);
  expect_near("lse", lse, t.lse, 1e-5);
  for (const Tensor* x : {&d.out, &d.dq, &d.dk, &d.dv}) expect(x->gaps_are_whole(), "wrote between the rows");
}

std::string described(const Implementation& by, const Shape& s) {
  const auto joined = [](const Lengths& lengths) {
    std::string all;
    for (int64_t length : lengths) all += text(all.empty() ? "" : ",", length);
    return all;
  };
  return text(by.name, ", dtype ", s.dtype, ", queries ", joined(s.q), ", keys ", joined(s.k), ", ", s.heads,
              " heads of ", s.head_dim, ", gap ", s.gap, ", threshold ", s.site.threshold);
}

void check_shape(const Shape& s) {
  Random random(11);
  for (const Implementation& by : implementations(s.dtype)) {
    where = described(by, s);
    Direction d(random, s);
    run(by, {&d});
    expect_right(d);
  }
}

const Site kNoDropout{1, 2, 3, 0}, kDropout{0xFFFFFFF0u, 2, 3, 6554};
const Lengths kMixed{1, 2, 7, 63, 64, 65, 101}, kReversed{101, 65, 64, 63, 7, 2, 1};

}  // namespace

TEST(attention_lengths) {
  for (int32_t dtype : kDtypes)
    for (int64_t head_dim : {1, 5, 8, 24, 64, 128})
      for (const Site& site : {kNoDropout, kDropout}) {
        check_shape({dtype, kMixed, kMixed, 2, head_dim, 0, site});
        check_shape({dtype, kMixed, kReversed, 2, head_dim, 3 * head_dim + 1, site});
      }
}

TEST(attention_long) {
  for (int32_t dtype : kDtypes)
    for (const Site& site : {kNoDropout, kDropout}) {
      check_shape({dtype, {256, 306}, {306, 100}, 1, 64, 0, site});
      check_shape({dtype, {1, 513, 20}, {700, 70, 1030}, 1, 24, 24, site});  // more than are held at a time
      check_shape({dtype, {1100}, {3}, 1, 8, 0, site});
      check_shape({dtype, {40}, {50}, 1, 256, 0, site});
    }
}

TEST(attention_one_query) {
  for (int32_t dtype : kDtypes)
    for (const Site& site : {kNoDropout, kDropout}) check_shape({dtype, Lengths(7, 1), kMixed, 3, 64, 64, site});
}

TEST(attention_one_key) {
  Random random(12);
  for (int32_t dtype : kDtypes)
    for (const Site& site : {kNoDropout, kDropout}) {
      const Shape shape{dtype, kMixed, Lengths(7, 1), 2, 24, 0, site};
      for (const Implementation& by : implementations(dtype)) {
        where = described(by, shape);
        Direction d(random, shape);
        run(by, {&d});
        const Truth t = truth_of(d);
        expect_near("out", d.out.values(), t.out, allowed_of(dtype));
        expect_near("dv", d.dv.values(), t.dv, allowed_of(dtype));
        for (const Values& x : {d.dq.values(), d.dk.values()})  // its probability is 1, whatever its score
          for (int64_t i = 0; i < x.size(); ++i) expect(x[i] == 0, "the gradient of a lone key's score is not 0");
      }
    }
}

TEST(attention_far_scores) {
  // Scores of some hundreds: a softmax that is all but one key's, and exponentials that vanish.
  Random random(13);
  const Shape shape{kFloat32, {37}, {90}, 1, 16, 0, kNoDropout};
  where = "";
  Direction d(random, shape);
  for (int64_t i = 0; i < d.q_values.size(); ++i) d.q_values.set(i, d.q_values[i] * 64);
  std::memcpy(d.q.data(), d.q_values.data(), static_cast<size_t>(d.q_values.size()) * 4);
  run(implementations(kFloat32)[0], {&d});
  const Truth t = truth_of(d);
  expect_near("out", d.out.values(), t.out, 2e-5);  // a score of 500 is itself off by 3e-5
  expect_near("dv", d.dv.values(), t.dv, 2e-5);
}

TEST(attention_two_directions) {
  Random random(14);
  for (int32_t dtype : kDtypes)
    for (const Implementation& by : implementations(dtype)) {
      where = described(by, {dtype, {12, 5, 9}, {101, 30, 64}, 2, 32, 0, kDropout});
      Direction text_reads{random, {dtype, {12, 5, 9}, {101, 30, 64}, 2, 32, 0, kDropout}};
      Direction image_reads{random, {dtype, {101, 30, 64}, {12, 5, 9}, 2, 32, 32, kNoDropout}};
      run(by, {&text_reads, &image_reads});
      expect_right(text_reads);
      expect_right(image_reads);
    }
}

TEST(attention_without_lse) {
  Random random(15);
  where = "";
  Direction d(random, {kBFloat16, {9}, {70}, 2, 64, 0, kDropout});
  run(implementations(kBFloat16)[0], {&d});
  const Values out = d.out.values();
  StopgoDirection call = d.call();
  call.lse = nullptr, call.dout = nullptr, call.dq = call.dk = call.dv = nullptr;
  stopgo_attention_forward(kBFloat16, 1, &call, 1, 2, 64);
  expect(d.out.values() == out, "the output differs");
}

TEST(attention_same_bits) {
  for (int32_t dtype : kDtypes)
    for (const Implementation& by : implementations(dtype)) {
      where = text(by.name, ", dtype ", dtype);
      expect_same_bits_on_two_threads([&] {
        Random random(16);
        Direction first(random, {dtype, kMixed, kReversed, 4, 64, 0, kDropout});
        Direction second(random, {dtype, kReversed, kMixed, 4, 64, 0, kDropout});
        run(by, {&first, &second});
        std::vector<Values> all = first.results();
        for (const Values& x : second.results()) all.push_back(x);
        return all;
      });
    }
}

TEST(attention_item_alone) {
  // An item's result does not depend on its neighbours, nor on what an earlier call left in the scratch memory.
  for (int32_t dtype : kDtypes)
    for (const Implementation& by : implementations(dtype)) {
      where = text(by.name, ", dtype ", dtype);
      Random random(17), same(17);
      Direction pair(random, {dtype, {33, 70}, {50, 20}, 1, 40, 0, kNoDropout});
      Direction other(random, {dtype, {130, 70}, {150, 200}, 1, 40, 0, kNoDropout});
      Direction alone(same, {dtype, {33}, {50}, 1, 40, 0, kNoDropout});
      for (const auto& [to, from] : {std::pair(&alone.q, &pair.q), std::pair(&alone.k, &pair.k),
                                     std::pair(&alone.v, &pair.v), std::pair(&alone.dout, &pair.dout)})
        std::memcpy(to->data(), from->data(), static_cast<size_t>(to->values().size() * format_of(dtype).size));
      run(by, {&other});
      run(by, {&pair});
      run(by, {&other});
      run(by, {&alone});
      const auto together = pair.results(), apart = alone.results();
      for (size_t i = 0; i < apart.size(); ++i)
        for (int64_t n = 0; n < apart[i].size(); ++n)
          if (!(apart[i][n] == together[i][n])) {
            fail(text("result ", i, " differs at ", n));
            break;
          }
    }
}

namespace {

template <class Math>
void check_products(const char* name) {
  using namespace stopgo;
  [[maybe_unused]] const typename Math::Session session;
  Random random(18);
  for (int64_t rows : {1, 5, 6, 16, 17, 32, 47})
    for (int64_t columns : {1, 16, 17, 48, 65})
      for (int64_t sum : {1, 2, 31, 33, 100}) {
        where = text(name, " ", rows, "x", columns, "x", sum);
        const int64_t depth = depth_of<Math>(sum), per_unit = Math::kPerUnit;
        Workspace& scratch = own_workspace();
        const Units a = scratch.units(rows, depth), b = scratch.units(depth, columns);
        const Sums c = scratch.sums(rows, columns);
        const int32_t dtype = per_unit == 1 ? kFloat32 : kBFloat16;
        Values left = random.values(dtype, rows * sum), right = random.values(dtype, sum * columns);
        zero_rows(a, 0, rows, depth);
        zero_rows(b, 0, depth, round_up(columns, kPad));
        const auto put = [&](Units u, int64_t r, int64_t n, int64_t half, const Values& from, int64_t i) {
          std::memcpy(reinterpret_cast<char*>(u.row(r) + n) + 2 * half,
                      static_cast<const char*>(from.data()) + i * (4 / per_unit), static_cast<size_t>(4 / per_unit));
        };
        for (int64_t k = 0; k < sum; ++k) {
          for (int64_t r = 0; r < rows; ++r) put(a, r, k / per_unit, k % per_unit, left, r * sum + k);
          for (int64_t n = 0; n < columns; ++n) put(b, k / per_unit, n, k % per_unit, right, k * columns + n);
        }
        Math::product(rows, columns, depth, a, b, c);
        Math::product(rows, columns, depth, a, b, c, true);
        Values found(kFloat32, rows * columns);
        Doubles truth(static_cast<size_t>(rows * columns));
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t n = 0; n < columns; ++n) {
            found.set(r * columns + n, c.row(r)[n]);
            for (int64_t k = 0; k < sum; ++k)
              truth[static_cast<size_t>(r * columns + n)] += 2 * left[r * sum + k] * right[k * columns + n];
          }
        expect_near("product", found, truth, 2e-6);
      }
}

}  // namespace

TEST(products) {
  check_products<stopgo::SingleMath>("singles");
#if defined(__AVX512BF16__)
  check_products<stopgo::PairMath>("pairs");
#endif
#if defined(__AMX_BF16__)
  check_products<stopgo::TileMath>("tiles");
#endif
}
