// Rows of losses over classes, their gradients in the same pass: multi-label cross-entropy against sparse soft labels,
// divergence from a detector's distribution, cross-entropy of one label. All in float32 from the logits on.
#include <cmath>
#include <limits>

#include "columns.h"
#include "elementary.h"
#include "parallel.h"
#include "stopgo.h"

namespace stopgo {
namespace {

constexpr float kLowest = -std::numeric_limits<float>::infinity();

// A sum over many classes. Parts of it are kept small, or narrow vectors would lose what thousands of additions round away.
class LongSum {
 public:
  STOPGO_INLINE void add(Floats x) {
    part_ += x;
    if (++count_ % 32 == 0) {
      total_ += part_;
      part_ = Floats{};
    }
  }
  STOPGO_INLINE float value() const { return sum(total_ + part_); }

 private:
  Floats total_{}, part_{};
  int count_ = 0;
};

// The class of the largest logit, the first one of equals.
template <class T>
int64_t first_largest(int64_t classes, const T* logits) {
  Floats top = broadcast(kLowest);
  for_vectors(classes, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
    top = maximum(top, only(load(logits + c, lanes), lanes, kLowest));
  });
  const float value = largest(top);
  for (int64_t c = 0; c < classes; ++c)
    if (load_one(logits + c) == value) return c;
  return 0;  // NaNs only
}

// One example: its entries are labels[0:entries], scores[0:entries].
template <class T>
struct SoftLabels {
  int64_t classes, entries;
  const int64_t* labels;
  const float* scores;

  float loss(const T* logits) const {
    LongSum total;  // of softplus(z) = max(z, 0) + log(1 + exp(-|z|))
    for_vectors(classes, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
      const Floats z = load(logits + c, lanes);
      total.add(only(maximum(z, Floats{}) + log1p_of_fraction(exp(-absolute(z))), lanes));
    });
    float loss = total.value();
    for (int64_t e = 0; e < entries; ++e) loss -= scores[e] * load_one(logits + labels[e]);
    return loss;
  }

  float score(const T* logits) const {
    const int64_t chosen = first_largest(classes, logits);
    float score = 0.0f;
    for (int64_t e = 0; e < entries; ++e)
      if (labels[e] == chosen) score += scores[e];
    return score;
  }

  // (sigmoid(z) - t) * share; row: float32 [classes in whole vectors], since a label may stand in several entries.
  void gradient(const T* logits, float share, float* row, T* dlogits) const {
    for_vectors(classes, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
      const Floats z = load(logits + c, lanes), e = exp(-absolute(z)), smaller = e / (e + 1.0f);
      store(row + c, z > 0.0f ? 1.0f / (e + 1.0f) : smaller);
    });
    for (int64_t e = 0; e < entries; ++e) row[labels[e]] -= scores[e];
    for_vectors(classes, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
      store(dlogits + c, load(row + c) * share, lanes);
    });
  }
};

template <class T>
void soft_label_bce(int64_t examples, int64_t classes, const T* logits, const int64_t* offsets, const int64_t* labels,
                    const float* scores, float* loss, float* score, T* dlogits) {
  const float share = 1.0f / static_cast<float>(examples);
  for_chunks(examples, classes, 1, [=](int64_t, int64_t first, int64_t last) {
    float* row = own_scratch().get<float>(whole_vectors(classes));
    for (int64_t b = first; b < last; ++b) {
      const T* z = logits + b * classes;
      const SoftLabels<T> target{classes, offsets[b + 1] - offsets[b], labels + offsets[b], scores + offsets[b]};
      loss[b] = target.loss(z);
      score[b] = target.score(z);
      if (dlogits != nullptr) target.gradient(z, share, row, dlogits + b * classes);
    }
  });
}

// The logarithm of a row's sum of exponentials of z + bias.
template <class T>
float log_sum_exp(int64_t classes, const T* logits, const float* bias) {
  Floats top = broadcast(kLowest);
  for_vectors(classes, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
    top = maximum(top, only(load(logits + c, lanes) + load(bias + c), lanes, kLowest));
  });
  const float shift = largest(top);
  LongSum total;
  for_vectors(classes, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
    total.add(only(exp(load(logits + c, lanes) + load(bias + c) - shift), lanes));
  });
  return shift + std::log(total.value());
}

// Targets of rows. `row` gives one row's loss and what its gradient needs: scale * (mass * softmax(z) - t).

template <class Target>
struct Divergence {
  const Target* target;

  struct Row {
    const Target* t;
    float loss, mass;

    template <class Lanes>
    STOPGO_INLINE Floats less(Floats softmax, int64_t c, Lanes lanes) const {
      return softmax * mass - load(t + c, lanes);
    }
  };

  template <class T>
  Row row(int64_t r, int64_t classes, const T* logits, const float* bias, float lse) const {
    const Target* t = target + r * classes;
    LongSum loss, mass;
    for_vectors(classes, [&](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
      const Floats p = load(t + c, lanes), log_q = load(logits + c, lanes) + load(bias + c) - lse;
      loss.add(p > 0.0f ? p * (log(p) - log_q) : Floats{});
      mass.add(p);
    });
    return {t, loss.value(), mass.value()};
  }
};

struct OneLabel {
  const int64_t* labels;

  struct Row {
    int64_t label;
    float loss;

    template <class Lanes>
    STOPGO_INLINE Floats less(Floats softmax, int64_t c, Lanes) const {
      const Ints at = lane_numbers() == static_cast<int32_t>(label - c);
      return softmax - bits_as<Floats>(at & bits_as<Ints>(broadcast(1.0f)));
    }
  };

  template <class T>
  Row row(int64_t r, int64_t, const T* logits, const float* bias, float lse) const {
    const int64_t label = labels[r];
    return {label, lse - (load_one(logits + label) + bias[label])};
  }
};

constexpr int64_t kLossRows = 8;  // of a chunk: rows are long and few

template <class T, class Targets>
void softmax_rows(int64_t rows, int64_t classes, T* logits, const T* bias, const Targets& targets, float scale,
                  bool gradient, float* loss, float* dbias) {
  const int64_t padded = whole_vectors(classes), chunks = chunks_of(rows, kLossRows);
  float* b = call_scratch().get<float>((1 + (gradient ? chunks : 0)) * padded);
  convert(bias, classes, b);
  const ColumnSums sums(b + padded, 1, classes);
  for_chunks(rows, classes, kLossRows, [=](int64_t chunk, int64_t first, int64_t last) {
    float* column_sums = gradient ? sums.start(chunk) : nullptr;
    for (int64_t r = first; r < last; ++r) {
      T* z = logits + r * classes;
      const float lse = log_sum_exp(classes, z, b);
      const auto row = targets.row(r, classes, z, b, lse);
      loss[r] = row.loss;
      if (!gradient) continue;
      for_vectors(classes, [=](int64_t c, auto lanes) STOPGO_INLINE_LAMBDA {
        const Floats dz = row.less(exp(load(z + c, lanes) + load(b + c) - lse), c, lanes) * scale;
        store(z + c, dz, lanes);
        store(column_sums + c, load(column_sums + c) + dz);
      });
    }
  });
  if (gradient && dbias != nullptr)
    sums.finish(chunks, 0, [=](int64_t c, Floats total, auto lanes) STOPGO_INLINE_LAMBDA {
      store(dbias + c, load(dbias + c, lanes) + total, lanes);
    });
}

}  // namespace
}  // namespace stopgo

using namespace stopgo;

extern "C" {

void stopgo_soft_label_bce(int32_t dtype, int64_t examples, int64_t classes, const void* logits, const int64_t* offsets,
                           const int64_t* labels, const float* scores, float* loss, float* score, void* dlogits) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    soft_label_bce(examples, classes, static_cast<const T*>(logits), offsets, labels, scores, loss, score,
                   static_cast<T*>(dlogits));
  });
}

void stopgo_divergence_rows(int32_t dtype, int64_t rows, int64_t classes, void* logits, const void* bias,
                            int32_t target_dtype, const void* target, float scale, int32_t gradient, float* loss,
                            float* dbias) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    with_dtype(target_dtype, [=](auto target_zero) {
      const Divergence<decltype(target_zero)> targets{static_cast<const decltype(target_zero)*>(target)};
      softmax_rows(rows, classes, static_cast<T*>(logits), static_cast<const T*>(bias), targets, scale, gradient != 0,
                   loss, dbias);
    });
  });
}

void stopgo_cross_entropy_rows(int32_t dtype, int64_t rows, int64_t classes, void* logits, const void* bias,
                               const int64_t* labels, float scale, int32_t gradient, float* loss, float* dbias) {
  with_dtype(dtype, [=](auto zero) {
    using T = decltype(zero);
    softmax_rows(rows, classes, static_cast<T*>(logits), static_cast<const T*>(bias), OneLabel{labels}, scale,
                 gradient != 0, loss, dbias);
  });
}

}  // extern "C"
