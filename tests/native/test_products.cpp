// The products of a projection against float64, where the library has them.
#include "check.h"

using namespace check;

#if defined(__AMX_BF16__) || defined(__AMXBF16__)

namespace {

struct Shape {
  int64_t rows, width, depth, gap;  // rows of x, y and their gradients are `gap` further apart than they are wide
};

template <class F>
void for_shapes(F&& f) {
  for (int64_t rows : {1, 2, 7, 31, 32, 33, 63, 64, 65, 101, 300})
    for (int64_t width : {32, 96, 160})
      for (int64_t depth : {32, 64, 224})
        for (int64_t gap : {0, 3}) {
          where = text(rows, " rows, ", width, " from ", depth, ", ", gap, " apart");
          f(Shape{rows, width, depth, gap * 2});
        }
}

Values matrix(Random& random, int64_t rows, int64_t width, int64_t gap) {
  return random.values(kBFloat16, (rows - 1) * (width + gap) + width);
}

// What lies at [row][column] of each, summed over n.
template <class A, class B>
double dot(int64_t n, A&& a, B&& b) {
  double sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += a(i) * b(i);
  return sum;
}

// Rounded once to bfloat16, from a sum in float32: compared where values are, without the gaps.
void expect_product(const char* what, const Values& found, const std::vector<double>& truth, int64_t rows, int64_t width,
                    int64_t stride) {
  Values dense(kBFloat16, rows * width);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < width; ++c) dense.set(r * width + c, found[r * stride + c]);
  expect_close(what, dense, truth, 2);
}

}  // namespace

TEST(projection_forward) {
  Random random(21);
  for_shapes([&](const Shape& s) {
    const int64_t x_stride = s.depth + s.gap, y_stride = s.width + s.gap;
    const Values x = matrix(random, s.rows, s.depth, s.gap), w = random.values(kBFloat16, s.width * s.depth);
    const Values bias = random.values(kBFloat16, s.width);
    for (bool with_bias : {false, true}) {
      std::vector<double> truth;
      for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t n = 0; n < s.width; ++n)
          truth.push_back(dot(s.depth, [&](int64_t k) { return x[r * x_stride + k]; },
                              [&](int64_t k) { return w[n * s.depth + k]; }) + (with_bias ? bias[n] : 0.0));
      Values y(kBFloat16, (s.rows - 1) * y_stride + s.width);
      stopgo_projection_forward(s.rows, s.width, s.depth, x.data(), x_stride, w.data(),
                                with_bias ? bias.data() : nullptr, y.data(), y_stride);
      expect_product("y", y, truth, s.rows, s.width, y_stride);
    }
  });
}

TEST(projection_input_gradient) {
  Random random(22);
  for_shapes([&](const Shape& s) {
    const int64_t dy_stride = s.depth + s.gap, dx_stride = s.width + s.gap;
    const Values dy = matrix(random, s.rows, s.depth, s.gap), w = random.values(kBFloat16, s.depth * s.width);
    const Values before = matrix(random, s.rows, s.width, s.gap);
    for (int32_t add : {0, 1}) {
      std::vector<double> truth;
      for (int64_t r = 0; r < s.rows; ++r)
        for (int64_t k = 0; k < s.width; ++k)
          truth.push_back(dot(s.depth, [&](int64_t n) { return dy[r * dy_stride + n]; },
                              [&](int64_t n) { return w[n * s.width + k]; }) + (add ? before[r * dx_stride + k] : 0.0));
      Values dx = before;
      stopgo_projection_input_gradient(s.rows, s.width, s.depth, dy.data(), dy_stride, w.data(), dx.data(), dx_stride, add);
      expect_product("dx", dx, truth, s.rows, s.width, dx_stride);
    }
  });
}

TEST(projection_weight_gradient) {
  Random random(23);
  const auto check = [&](const Shape& s) {
    const int64_t dy_stride = s.width + s.gap, x_stride = s.depth + s.gap;
    const Values dy = matrix(random, s.rows, s.width, s.gap), x = matrix(random, s.rows, s.depth, s.gap);
    std::vector<double> truth;
    for (int64_t n = 0; n < s.width; ++n)
      for (int64_t k = 0; k < s.depth; ++k)
        truth.push_back(dot(s.rows, [&](int64_t r) { return dy[r * dy_stride + n]; },
                            [&](int64_t r) { return x[r * x_stride + k]; }));
    std::vector<double> sums(static_cast<size_t>(s.width));
    for (int64_t n = 0; n < s.width; ++n)
      for (int64_t r = 0; r < s.rows; ++r) sums[static_cast<size_t>(n)] += dy[r * dy_stride + n];
    Values dw(kBFloat16, s.width * s.depth), dbias(kBFloat16, s.width);
    for (bool with_bias : {false, true}) {
      stopgo_projection_weight_gradient(s.rows, s.width, s.depth, dy.data(), dy_stride, x.data(), x_stride, dw.data(),
                                        with_bias ? dbias.data() : nullptr);
      expect_product("dw", dw, truth, s.width, s.depth, s.depth);
    }
    expect_close("dbias", dbias, sums, 64);
  };
  for_shapes(check);
  where = "4099 rows, in parts";
  check({4099, 64, 320, 6});
}

TEST(projection_with_gelu) {
  Random random(24);
  for_shapes([&](const Shape& s) {
    const int64_t stride = s.depth + s.gap;
    const Values x = matrix(random, s.rows, s.depth, s.gap), w = random.values(kBFloat16, s.width * s.depth);
    const Values bias = random.values(kBFloat16, s.width);
    Values inner(kBFloat16, s.rows * s.width), y = inner, alone = inner, activated = inner;
    stopgo_projection_gelu_forward(s.rows, s.width, s.depth, x.data(), stride, w.data(), bias.data(), inner.data(), y.data());
    stopgo_projection_forward(s.rows, s.width, s.depth, x.data(), stride, w.data(), nullptr, alone.data(), s.width);
    stopgo_bias_gelu_forward(kBFloat16, s.rows, s.width, alone.data(), bias.data(), activated.data());
    expect(inner == alone, "the projection is another one");
    expect(y == activated, "the activation is another one");

    Values turned(kBFloat16, s.width * s.depth), dinner = alone;
    for (int64_t n = 0; n < s.width; ++n)
      for (int64_t k = 0; k < s.depth; ++k) turned.set(k * s.width + n, w[n * s.depth + k]);
    stopgo_projection_gelu_gradient(s.rows, s.width, s.depth, x.data(), stride, turned.data(), bias.data(), inner.data(),
                                    dinner.data());
    expect(inner == activated, "backward makes another activation");
    std::vector<double> truth;
    double largest = 0;
    for (int64_t r = 0; r < s.rows; ++r)
      for (int64_t n = 0; n < s.width; ++n) {
        const double dy = dot(s.depth, [&](int64_t k) { return x[r * stride + k]; },
                              [&](int64_t k) { return w[n * s.depth + k]; });
        const double z = alone[r * s.width + n] + bias[n];
        const double slope = 0.5 * std::erfc(-z / std::sqrt(2.0)) + z * std::exp(-0.5 * z * z) / std::sqrt(2 * M_PI);
        truth.push_back(dy * slope);
        largest = std::max(largest, std::fabs(dy));
      }
    expect_close("dinner", dinner, truth, 2, 3e-5 * largest);
  });
}

TEST(projection_on_two_threads) {
  Random random(24);
  const int64_t rows = 130, width = 192, depth = 256;
  const Values x = random.values(kBFloat16, rows * depth), dy = random.values(kBFloat16, rows * width);
  const Values w = random.values(kBFloat16, width * depth);
  expect_same_bits_on_two_threads([&] {
    Values y(kBFloat16, rows * width), dx(kBFloat16, rows * depth);
    Values dw(kBFloat16, width * depth), dbias(kBFloat16, width);
    stopgo_projection_forward(rows, width, depth, x.data(), depth, w.data(), nullptr, y.data(), width);
    stopgo_projection_input_gradient(rows, depth, width, dy.data(), width, w.data(), dx.data(), depth, 0);
    stopgo_projection_weight_gradient(rows, width, depth, dy.data(), width, x.data(), depth, dw.data(),
                                      dbias.data());
    return std::vector<Values>{y, dx, dw, dbias};
  });
}

#endif
