// The losses over rows of classes against float64.
#include <algorithm>

#include "check.h"

using namespace check;

namespace {

using Doubles = std::vector<double>;

double softplus(double z) { return std::max(z, 0.0) + std::log1p(std::exp(-std::fabs(z))); }

struct SoftLabels {
  std::vector<int64_t> offsets{0}, labels;
  std::vector<float> scores;

  void add(int64_t label, double score) {
    labels.push_back(label);
    scores.push_back(static_cast<float>(score));
  }
  void end_example() { offsets.push_back(static_cast<int64_t>(labels.size())); }
};

void check_soft_labels(const Values& logits, int64_t examples, int64_t classes, const SoftLabels& given) {
  Doubles loss_truth, score_truth, gradient = Doubles(static_cast<size_t>(examples * classes));
  for (int64_t b = 0; b < examples; ++b) {
    const auto at = [&](int64_t c) { return logits[b * classes + c]; };
    double loss = 0, score = 0;
    int64_t best = 0;
    for (int64_t c = 0; c < classes; ++c) {
      loss += softplus(at(c));
      gradient[static_cast<size_t>(b * classes + c)] = 1 / (1 + std::exp(-at(c)));
      if (at(c) > at(best)) best = c;
    }
    for (auto e = static_cast<size_t>(given.offsets[static_cast<size_t>(b)]);
         e < static_cast<size_t>(given.offsets[static_cast<size_t>(b) + 1]); ++e) {
      loss -= given.scores[e] * at(given.labels[e]);
      gradient[static_cast<size_t>(b * classes + given.labels[e])] -= given.scores[e];
      if (given.labels[e] == best) score += given.scores[e];
    }
    loss_truth.push_back(loss);
    score_truth.push_back(score);
  }
  for (double& value : gradient) value /= static_cast<double>(examples);
  Values loss(kFloat32, examples), score(kFloat32, examples), dlogits(logits.dtype(), examples * classes);
  const auto call = [&](void* destination) {
    stopgo_soft_label_bce(logits.dtype(), examples, classes, logits.data(), given.offsets.data(), given.labels.data(),
                          given.scores.data(), loss.floats(), score.floats(), destination);
  };
  call(dlogits.data());
  expect_close("loss", loss, loss_truth, 32);
  expect_close("score", score, score_truth, 1);
  expect_close("dlogits", dlogits, gradient, 4);
  Values loss_before = loss;
  call(nullptr);
  expect(loss == loss_before, "without dlogits: another loss");
}

}  // namespace

TEST(soft_label_bce) {
  Random random(11);
  for (int32_t dtype : kDtypes)
    for (int64_t classes : {1, 5, 63, 64, 65, 1601, 3129})
      for (int64_t examples : {0, 1, 2, 13})
        for (double scale : {1.0, 20.0}) {
          where = text("dtype ", dtype, ", ", examples, " of ", classes, " classes, scale ", scale);
          const Values logits = random.values(dtype, examples * classes, scale);
          SoftLabels given;
          for (int64_t b = 0; b < examples; ++b) {
            for (int64_t e = random.below(5); e > 0; --e)
              given.add(random.below(classes), 0.3 * static_cast<double>(1 + random.below(3)));
            if (b % 2 == 0 && !given.labels.empty() && given.offsets.back() < static_cast<int64_t>(given.labels.size()))
              given.add(given.labels.back(), 0.3);  // a label may repeat
            given.end_example();
          }
          check_soft_labels(logits, examples, classes, given);
        }
}

TEST(soft_label_score_is_of_the_first_largest) {
  SoftLabels given;
  for (int64_t label : {3, 40, 3}) given.add(label, 0.5);
  given.end_example();
  for (int32_t dtype : kDtypes) {
    Values logits(dtype, Doubles(65, -2.0));
    logits.set(3, 7), logits.set(40, 7);
    Values loss(kFloat32, 1), score(kFloat32, 1);
    stopgo_soft_label_bce(dtype, 1, 65, logits.data(), given.offsets.data(), given.labels.data(), given.scores.data(),
                          loss.floats(), score.floats(), nullptr);
    expect(score[0] == 1.0, text("score ", score[0], ", not both entries of class 3"));
  }
}

namespace {

// loss and scale * (softmax * sum(t) - t) of rows, and the column sums of that, starting from `dbias`.
struct SoftmaxTruth {
  Doubles loss, gradient, dbias;

  SoftmaxTruth(int64_t rows, int64_t classes, const Values& logits, const Values& bias, const Doubles& target,
               double scale, Doubles start, bool entropy)
      : dbias(std::move(start)) {
    for (int64_t r = 0; r < rows; ++r) {
      Doubles z;
      for (int64_t c = 0; c < classes; ++c) z.push_back(logits[r * classes + c] + bias[c]);
      const double top = *std::max_element(z.begin(), z.end());
      double sum = 0, mass = 0, row_loss = 0;
      for (double value : z) sum += std::exp(value - top);
      for (int64_t c = 0; c < classes; ++c) {
        const double t = target[static_cast<size_t>(r * classes + c)],
                     log_q = z[static_cast<size_t>(c)] - top - std::log(sum);
        mass += t;
        if (t > 0) row_loss += t * ((entropy ? std::log(t) : 0) - log_q);
      }
      loss.push_back(row_loss);
      for (int64_t c = 0; c < classes; ++c) {
        const double p = std::exp(z[static_cast<size_t>(c)] - top) / sum;
        gradient.push_back(scale * (p * mass - target[static_cast<size_t>(r * classes + c)]));
        dbias[static_cast<size_t>(c)] += gradient.back();
      }
    }
  }
};

using Call = std::function<void(void* logits, int32_t gradient, float* loss, float* dbias)>;

void check_softmax_rows(int64_t classes, const Values& logits, const SoftmaxTruth& truth, const Values& dbias_before,
                        const Call& call, double slack) {
  const auto rows = static_cast<int64_t>(truth.loss.size());
  Values loss(kFloat32, rows), loss_again(kFloat32, rows), dlogits = logits, dlogits_again = logits,
                                                           dbias = dbias_before;
  call(dlogits.data(), 1, loss.floats(), dbias.floats());
  expect_close("loss", loss, truth.loss, slack);
  expect_close("dlogits", dlogits, truth.gradient, slack);
  expect_close("dbias", dbias, truth.dbias, slack);
  call(dlogits_again.data(), 1, loss_again.floats(), nullptr);
  expect(dlogits_again == dlogits && loss_again == loss, "without dbias: other results");
  Values untouched = logits;
  call(untouched.data(), 0, loss_again.floats(), nullptr);
  expect(untouched == logits && loss_again == loss, "without gradient: logits written, or another loss");
  (void)classes;
}

}  // namespace

TEST(divergence_rows) {
  Random random(12);
  for (int32_t dtype : kDtypes)
    for (int32_t target_dtype : kDtypes)
      for (int64_t classes : {1, 5, 63, 64, 65, 1601})
        for (int64_t rows : {0, 1, 2, 19}) {
          where = text("dtype ", dtype, ", target ", target_dtype, ", ", rows, " rows of ", classes);
          const Values logits = random.values(dtype, rows * classes, 4), bias = random.values(dtype, classes);
          Values target(target_dtype, rows * classes);
          Doubles t;
          for (int64_t i = 0; i < rows * classes; ++i) {
            target.set(i, i % 3 == 0
                              ? 0.0
                              : std::exp(2 * random.normal()) / static_cast<double>(classes));  // sums to what it likes
            t.push_back(target[i]);
          }
          const Values dbias = random.values(kFloat32, classes);
          Doubles start;
          for (int64_t c = 0; c < classes; ++c) start.push_back(dbias[c]);
          const SoftmaxTruth truth(rows, classes, logits, bias, t, static_cast<float>(0.37), start, true);
          check_softmax_rows(
              classes, logits, truth, dbias,
              [&](void* z, int32_t gradient, float* loss, float* sums) {
                stopgo_divergence_rows(dtype, rows, classes, z, bias.data(), target_dtype, target.data(), 0.37f,
                                       gradient, loss, sums);
              },
              100);
        }
}

TEST(cross_entropy_rows) {
  Random random(13);
  for (int32_t dtype : kDtypes)
    for (int64_t classes : {1, 5, 63, 64, 65, 1601, 30522})
      for (int64_t rows : {0, 1, 2, 19}) {
        if (classes > 2000 && rows > 2) continue;
        for (double scale : {1.0, 20.0}) {  // up to +-60 and beyond
          where = text("dtype ", dtype, ", ", rows, " rows of ", classes, ", scale ", scale);
          const Values logits = random.values(dtype, rows * classes, scale), bias = random.values(dtype, classes);
          std::vector<int64_t> labels;
          Doubles t(static_cast<size_t>(rows * classes));
          for (int64_t r = 0; r < rows; ++r) {
            labels.push_back(r == 0 ? classes - 1 : random.below(classes));
            t[static_cast<size_t>(r * classes + labels.back())] = 1;
          }
          const Values dbias(kFloat32, classes);
          const SoftmaxTruth truth(rows, classes, logits, bias, t, 0.5, Doubles(static_cast<size_t>(classes)), false);
          check_softmax_rows(
              classes, logits, truth, dbias,
              [&](void* z, int32_t gradient, float* loss, float* sums) {
                stopgo_cross_entropy_rows(dtype, rows, classes, z, bias.data(), labels.data(), 0.5f, gradient, loss,
                                          sums);
              },
              200);
        }
      }
}

TEST(losses_on_two_threads) {
  Random random(14);
  const int64_t rows = 61, classes = 1601;
  const Values logits = random.values(kBFloat16, rows * classes), bias = random.values(kBFloat16, classes);
  Values target(kFloat32, rows * classes);
  for (int64_t i = 0; i < rows * classes; ++i) target.set(i, std::exp(random.normal()) / 1601);
  std::vector<int64_t> labels, offsets{0};
  for (int64_t r = 0; r < rows; ++r) labels.push_back(random.below(classes)), offsets.push_back(r + 1);
  const std::vector<float> scores(static_cast<size_t>(rows), 0.6f);
  expect_same_bits_on_two_threads([&] {
    Values a = logits, b = logits, c = logits, loss(kFloat32, rows), loss_b = loss, loss_c = loss, score = loss;
    Values dbias(kFloat32, classes), dbias_b = dbias;
    stopgo_divergence_rows(kBFloat16, rows, classes, a.data(), bias.data(), kFloat32, target.data(), 1, 1,
                           loss.floats(), dbias.floats());
    stopgo_cross_entropy_rows(kBFloat16, rows, classes, b.data(), bias.data(), labels.data(), 1, 1, loss_b.floats(),
                              dbias_b.floats());
    stopgo_soft_label_bce(kBFloat16, rows, classes, logits.data(), offsets.data(), labels.data(), scores.data(),
                          loss_c.floats(), score.floats(), c.data());
    return std::vector<Values>{a, b, c, loss, loss_b, loss_c, score, dbias, dbias_b};
  });
}
