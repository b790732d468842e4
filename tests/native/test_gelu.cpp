// Bias and GELU, and column sums, against float64.
#include "check.h"

using namespace check;

namespace {

double below(double z) { return 0.5 * std::erfc(-z / std::sqrt(2.0)); }
double density(double z) { return std::exp(-z * z / 2) / std::sqrt(2 * 3.141592653589793); }

// What the kernels may be off by before the result is rounded: 16-bit types may have less, far below their rounding.
struct Off {
  double y, slope;
};
Off off_by(int32_t dtype) { return dtype == kFloat32 ? Off{3e-7, 3e-7} : Off{4.5e-6, 2.2e-5}; }

}  // namespace

TEST(bias_gelu) {
  Random random(8);
  for (int32_t dtype : kDtypes)
    for (int64_t width : {1, 5, 63, 64, 65, 96, 768, 1024, 1601})
      for (int64_t rows : {0, 1, 2, 37}) {
        where = text("dtype ", dtype, ", ", rows, " rows of ", width);
        const int64_t n = rows * width;
        const Values x = random.values(dtype, n, 2), bias = random.values(dtype, width), dy = random.values(dtype, n);
        std::vector<double> y_truth(static_cast<size_t>(n)), dx_truth = y_truth,
                                                             dbias_truth(static_cast<size_t>(width));
        for (int64_t i = 0; i < n; ++i) {
          const double z = x[i] + bias[i % width], dz = dy[i] * (below(z) + z * density(z));
          y_truth[static_cast<size_t>(i)] = z * below(z);
          dx_truth[static_cast<size_t>(i)] = dz;
          dbias_truth[static_cast<size_t>(i % width)] += dz;
        }
        Values y(dtype, n), dx(dtype, n), y_again(dtype, n), dbias(dtype, width), dbias_again(dtype, width);
        stopgo_bias_gelu_forward(dtype, rows, width, x.data(), bias.data(), y.data());
        stopgo_bias_gelu_backward(dtype, rows, width, dy.data(), x.data(), bias.data(), dx.data(), dbias.data(),
                                  y_again.data());
        double steepest = 0;
        for (int64_t i = 0; i < n; ++i) steepest = std::max(steepest, std::fabs(dy[i]));
        const Off off = off_by(dtype);
        expect_close("y", y, y_truth, 4, off.y);
        expect_close("dx", dx, dx_truth, 8, off.slope * steepest);
        expect_close("dbias", dbias, dbias_truth, 32, off.slope * steepest * static_cast<double>(rows));
        expect(y_again == y, "y of backward differs from forward's");

        Values over_x = x, over_dy = dy;
        stopgo_bias_gelu_forward(dtype, rows, width, over_x.data(), bias.data(), over_x.data());
        expect(over_x == y, "y over x differs");
        over_x = x;
        stopgo_bias_gelu_backward(dtype, rows, width, over_dy.data(), over_x.data(), bias.data(), over_dy.data(),
                                  dbias_again.data(), over_x.data());
        expect(over_dy == dx && over_x == y && dbias_again == dbias, "dx over dy and y over x differ");
        over_dy = dy;
        stopgo_bias_gelu_backward(dtype, rows, width, over_dy.data(), x.data(), bias.data(), over_dy.data(),
                                  dbias_again.data(), nullptr);
        expect(over_dy == dx && dbias_again == dbias, "without y: another gradient");
      }
}

TEST(bias_gelu_everywhere) {  // from where it is 0 to where it is z, in steps of 1/64
  for (int32_t dtype : kDtypes) {
    where = text("dtype ", dtype);
    std::vector<double> z, y_truth, dx_truth;
    for (double at = -16; at <= 16; at += 1.0 / 64) z.push_back(rounded(at, dtype));
    for (double at : z) {
      y_truth.push_back(at * below(at));
      dx_truth.push_back(below(at) + at * density(at));
    }
    const auto n = static_cast<int64_t>(z.size());
    const Values x(dtype, z), bias(dtype, std::vector<double>(z.size())), dy(dtype, std::vector<double>(z.size(), 1.0));
    Values y(dtype, n), dx(dtype, n), dbias(dtype, n);
    stopgo_bias_gelu_backward(dtype, 1, n, dy.data(), x.data(), bias.data(), dx.data(), dbias.data(), y.data());
    for (int64_t i = 0; i < n; ++i) {  // each to its own size, not to the largest
      const double digits = std::ldexp(1.0, -format_of(dtype).digits);
      const Off off = off_by(dtype);
      const double t = y_truth[static_cast<size_t>(i)], s = dx_truth[static_cast<size_t>(i)];
      expect(std::fabs(y[i] - t) <= std::fabs(t) * digits + off.y * std::min(1.0, std::fabs(z[static_cast<size_t>(i)])),
             text("gelu(", z[static_cast<size_t>(i)], ") = ", y[i], ", in float64 ", t));
      expect(std::fabs(dx[i] - s) <= std::fabs(s) * digits + off.slope,
             text("slope at ", z[static_cast<size_t>(i)], ": ", dx[i], ", in float64 ", s));
    }
  }
}

TEST(bias_gelu_on_two_threads) {
  Random random(9);
  const Values x = random.values(kBFloat16, 131 * 1024), bias = random.values(kBFloat16, 1024),
               dy = random.values(kBFloat16, 131 * 1024);
  expect_same_bits_on_two_threads([&] {
    Values y(kBFloat16, x.size()), dx = y, dbias(kBFloat16, 1024), sums = dbias;
    stopgo_bias_gelu_backward(kBFloat16, 131, 1024, dy.data(), x.data(), bias.data(), dx.data(), dbias.data(),
                              y.data());
    stopgo_column_sums(kBFloat16, 131, 1024, dy.data(), 1024, sums.data());
    return std::vector<Values>{y, dx, dbias, sums};
  });
}

TEST(column_sums) {
  Random random(10);
  for (int32_t dtype : kDtypes)
    for (int64_t width : {1, 5, 63, 64, 65, 96, 768, 1601})
      for (int64_t rows : {0, 1, 2, 37, 131})
        for (int64_t gap : {0, 7}) {
          where = text("dtype ", dtype, ", ", rows, " rows of ", width, ", ", gap, " apart");
          const int64_t stride = width + gap, n = rows == 0 ? 0 : (rows - 1) * stride + width;
          const Values x = random.values(dtype, n);
          std::vector<double> truth(static_cast<size_t>(width));
          for (int64_t r = 0; r < rows; ++r)
            for (int64_t c = 0; c < width; ++c) truth[static_cast<size_t>(c)] += x[r * stride + c];
          Values out(dtype, width);
          stopgo_column_sums(dtype, rows, width, x.data(), stride, out.data());
          expect_close("sums", out, truth, 32);
        }
}
