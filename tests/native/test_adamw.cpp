// The optimizer over flat buffers against float64.
#include "check.h"

using namespace check;

TEST(adamw) {
  Random random(15);
  const double lr = 1e-2, beta1 = 0.9, beta2 = 0.999, eps = 1e-6, decay = 0.01;
  for (int32_t dtype : kDtypes)
    for (int64_t n : {0, 1, 5, 63, 64, 65, 1601, 40000, 100003})
      for (bool with_weights : {true, false}) {
        where = text("dtype ", dtype, ", ", n, " values, ", with_weights ? "with" : "without", " weights");
        const Values gradient = random.values(dtype, n), p0 = random.values(kFloat32, n),
                     m0 = random.values(kFloat32, n, 0.1);
        Values v0 = random.values(kFloat32, n, 0.1);
        for (int64_t i = 0; i < n; ++i) v0.set(i, i % 7 == 0 ? 0.0 : v0[i] * v0[i]);
        std::vector<double> p_truth, m_truth, v_truth;
        for (int64_t i = 0; i < n; ++i) {
          const double g = gradient[i], m = beta1 * m0[i] + (1 - beta1) * g;
          const double v = beta2 * v0[i] + (1 - beta2) * g * g;
          const double moved = p0[i] - lr * m / (std::sqrt(v) + eps);
          p_truth.push_back(moved - lr * decay * moved);
          m_truth.push_back(m);
          v_truth.push_back(v);
        }
        Values p = p0, m = m0, v = v0, weights(dtype, n), rounded_p(dtype, n);
        const float go = 0, stop = 1;
        void* destination = with_weights ? weights.data() : nullptr;
        stopgo_adamw(dtype, n, gradient.data(), p.floats(), m.floats(), v.floats(), destination, lr, beta1, beta2, eps,
                     decay, &stop);
        expect(p == p0 && m == m0 && v == v0 && weights == rounded_p, "something changed in a skipped step");
        stopgo_adamw(dtype, n, gradient.data(), p.floats(), m.floats(), v.floats(), destination, lr, beta1, beta2, eps,
                     decay, &go);
        expect_close("m", m, m_truth, 4);
        expect_close("v", v, v_truth, 4);
        expect_close("p", p, p_truth, 4);
        for (int64_t i = 0; i < n; ++i) rounded_p.set(i, p[i]);
        if (with_weights) expect(weights == rounded_p, "weights are not p rounded to nearest even");
      }
}

TEST(square_sum) {
  Random random(16);
  for (int32_t dtype : kDtypes)
    for (int64_t n : {0, 1, 5, 63, 64, 65, 1601, 40000, 100003}) {
      where = text("dtype ", dtype, ", ", n, " values");
      const Values x = random.values(dtype, n);
      double truth = 0;
      for (int64_t i = 0; i < n; ++i) truth += x[i] * x[i];
      expect(std::fabs(stopgo_square_sum(dtype, n, x.data()) - truth) <= 1e-13 * truth,
             "off by more than float64's rounding");
    }
  const Values large(kFloat32, std::vector<double>(100, 1e30));
  expect(std::fabs(stopgo_square_sum(kFloat32, 100, large.data()) / 1e62 - 1) < 1e-6, "squares beyond float32's range");
}

TEST(optimizer_on_two_threads) {
  Random random(17);
  const int64_t n = 200003;
  const Values gradient = random.values(kBFloat16, n), start = random.values(kFloat32, n);
  const float go = 0;
  expect_same_bits_on_two_threads([&] {
    Values p = start, m(kFloat32, n), v(kFloat32, n), weights(kBFloat16, n), norm(kFloat32, 2);
    stopgo_adamw(kBFloat16, n, gradient.data(), p.floats(), m.floats(), v.floats(), weights.data(), 1e-3, 0.9, 0.999,
                 1e-6, 0, &go);
    const double sum = stopgo_square_sum(kBFloat16, n, gradient.data());
    std::memcpy(norm.data(), &sum, sizeof sum);
    return std::vector<Values>{p, m, v, weights, norm};
  });
}
