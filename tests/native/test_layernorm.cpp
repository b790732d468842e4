// The two fused LayerNorms against float64.
#include "check.h"

using namespace check;

namespace {

constexpr double kEps = 1e-12;

using Doubles = std::vector<double>;

Doubles doubles(int64_t n) { return Doubles(static_cast<size_t>(n)); }

int64_t row_tile(int64_t width) { return (width + 7) / 8 * 8; }

// LayerNorm of rows z, and what its backward needs, as the textbook has it.
struct Norm {
  int64_t rows, width;
  Doubles z, normal, rstd;

  Norm(int64_t rows, int64_t width, Doubles sums) : rows(rows), width(width), z(std::move(sums)) {
    normal = doubles(rows * width);
    rstd = doubles(rows);
    for (int64_t r = 0; r < rows; ++r) {
      double mean = 0, variance = 0;
      for (int64_t c = 0; c < width; ++c) mean += z[at(r, c)] / static_cast<double>(width);
      for (int64_t c = 0; c < width; ++c)
        variance += (z[at(r, c)] - mean) * (z[at(r, c)] - mean) / static_cast<double>(width);
      rstd[static_cast<size_t>(r)] = 1 / std::sqrt(variance + kEps);
      for (int64_t c = 0; c < width; ++c) normal[at(r, c)] = (z[at(r, c)] - mean) * rstd[static_cast<size_t>(r)];
    }
  }

  size_t at(int64_t r, int64_t c) const { return static_cast<size_t>(r * width + c); }

  // dz of dy; dweight and dshift are added up.
  Doubles backward(const Doubles& dy, const Values& weight, Doubles& dweight, Doubles& dshift) const {
    Doubles dz = doubles(rows * width);
    for (int64_t r = 0; r < rows; ++r) {
      double mean_g = 0, mean_gn = 0;
      for (int64_t c = 0; c < width; ++c) {
        const double g = dy[at(r, c)] * weight[c];
        mean_g += g / static_cast<double>(width);
        mean_gn += g * normal[at(r, c)] / static_cast<double>(width);
        dweight[static_cast<size_t>(c)] += dy[at(r, c)] * normal[at(r, c)];
        dshift[static_cast<size_t>(c)] += dy[at(r, c)];
      }
      for (int64_t c = 0; c < width; ++c)
        dz[at(r, c)] = rstd[static_cast<size_t>(r)] * (dy[at(r, c)] * weight[c] - mean_g - normal[at(r, c)] * mean_gn);
    }
    return dz;
  }
};

struct Case {
  int32_t dtype;
  int64_t rows, width;
  Site site;
  std::vector<int64_t> key, row;

  double mask(int64_t r, int64_t c) const {
    if (site.threshold == 0) return 1;
    return kept(site, key[static_cast<size_t>(r)], row[static_cast<size_t>(r)], c, row_tile(width)) ? site.scale() : 0;
  }
  int64_t size() const { return rows * width; }
};

void for_cases(Random& random, void (*check_case)(const Case&, Random&)) {
  for (int32_t dtype : kDtypes)
    for (int64_t width : {1, 5, 63, 64, 65, 96, 768, 1024, 1601})
      for (int64_t rows : {0, 1, 2, 37, 67})
        for (uint32_t threshold : {0u, 6554u}) {
          if (rows == 67 && width > 100 && width != 768) continue;
          where = text("dtype ", dtype, ", ", rows, " rows of ", width, ", threshold ", threshold);
          check_case({dtype, rows, width, {11, 22, 33, threshold}, random.keys(rows), random.keys(rows)}, random);
        }
}

struct BiasDropoutResidual {
  Case on;
  Values x, bias, residual, weight, shift, dy;

  BiasDropoutResidual(const Case& on, Random& random)
      : on(on),
        x(random.values(on.dtype, on.size())),
        bias(random.values(on.dtype, on.width)),
        residual(random.values(on.dtype, on.size(), 1, 3)),
        weight(random.values(on.dtype, on.width, 0.2, 1)),
        shift(random.values(on.dtype, on.width)),
        dy(random.values(on.dtype, on.size())) {}

  Norm norm() const {
    Doubles z = doubles(on.size());
    for (int64_t r = 0; r < on.rows; ++r)
      for (int64_t c = 0; c < on.width; ++c) {
        const int64_t i = r * on.width + c;
        z[static_cast<size_t>(i)] = (x[i] + bias[c]) * on.mask(r, c) + residual[i];
      }
    return Norm(on.rows, on.width, std::move(z));
  }

  // Results where x and residual point to them: y, mean, rstd.
  void forward(const Values& x_, const Values& residual_, void* y, float* mean, float* rstd) const {
    stopgo_bias_dropout_residual_layernorm_forward(on.dtype, on.rows, on.width, x_.data(), bias.data(),
                                                   residual_.data(), weight.data(), shift.data(), on.key.data(),
                                                   on.row.data(), on.site.seed, on.site.step, on.site.site,
                                                   on.site.threshold, static_cast<float>(kEps), y, mean, rstd);
  }

  struct Gradients {
    Values dbias, dweight, dshift;
    bool operator==(const Gradients& o) const { return dbias == o.dbias && dweight == o.dweight && dshift == o.dshift; }
  };
  Gradients backward(const Values& dy_, const Values& x_, const Values& residual_, Values& mean, Values& rstd, void* dx,
                     void* dresidual) const {
    Gradients g{{on.dtype, on.width}, {on.dtype, on.width}, {on.dtype, on.width}};
    stopgo_bias_dropout_residual_layernorm_backward(
        on.dtype, on.rows, on.width, dy_.data(), x_.data(), bias.data(), residual_.data(), weight.data(), mean.floats(),
        rstd.floats(), on.key.data(), on.row.data(), on.site.seed, on.site.step, on.site.site, on.site.threshold, dx,
        dresidual, g.dbias.data(), g.dweight.data(), g.dshift.data());
    return g;
  }
};

void check_bias_dropout_residual(const Case& on, Random& random) {
  const BiasDropoutResidual op(on, random);
  const Norm norm = op.norm();
  Doubles y_truth = doubles(on.size()), dy = doubles(on.size());
  for (int64_t i = 0; i < on.size(); ++i) {
    y_truth[static_cast<size_t>(i)] =
        norm.normal[static_cast<size_t>(i)] * op.weight[i % on.width] + op.shift[i % on.width];
    dy[static_cast<size_t>(i)] = op.dy[i];
  }
  Values y(on.dtype, on.size()), mean(kFloat32, on.rows), rstd(kFloat32, on.rows);
  op.forward(op.x, op.residual, y.data(), mean.floats(), rstd.floats());
  // Two values near each other are mostly rounding after the subtraction of their mean; one value is nothing else.
  const double slack = on.width == 1 ? 0 : on.width < 16 ? 500 : 64;
  expect_close("y", y, y_truth, slack);
  expect_close("rstd", rstd, norm.rstd, 64);

  Values over_x = op.x, over_residual = op.residual, without(on.dtype, on.size());
  op.forward(over_x, op.residual, over_x.data(), mean.floats(), rstd.floats());
  op.forward(op.x, over_residual, over_residual.data(), mean.floats(), rstd.floats());
  op.forward(op.x, op.residual, without.data(), nullptr, nullptr);
  expect(over_x == y && over_residual == y && without == y, "y over x, y over residual, or no mean: another y");

  Doubles dweight = doubles(on.width), dshift = doubles(on.width), dbias = doubles(on.width);
  const Doubles dz = norm.backward(dy, op.weight, dweight, dshift);
  Doubles dx_truth = dz;
  for (int64_t i = 0; i < on.size(); ++i) {
    dx_truth[static_cast<size_t>(i)] *= on.mask(i / on.width, i % on.width);
    dbias[static_cast<size_t>(i % on.width)] += dx_truth[static_cast<size_t>(i)];
  }
  Values dx(on.dtype, on.size()), dresidual(on.dtype, on.size());
  const auto g = op.backward(op.dy, op.x, op.residual, mean, rstd, dx.data(), dresidual.data());
  if (on.width > 5) {  // narrower rows have too little besides what the norm removes
    expect_close("dx", dx, dx_truth, 200);
    expect_close("dresidual", dresidual, dz, 200);
    expect_close("dbias", g.dbias, dbias, 400);
    expect_close("dweight", g.dweight, dweight, 200);
  }
  expect_close("dshift", g.dshift, dshift, 64);

  Values over_dy = op.dy, x_copy = op.x, residual_copy = op.residual, other(on.dtype, on.size());
  expect(op.backward(over_dy, op.x, op.residual, mean, rstd, over_dy.data(), other.data()) == g && over_dy == dx &&
             other == dresidual,
         "dx over dy differs");
  over_dy = op.dy;
  expect(op.backward(over_dy, op.x, op.residual, mean, rstd, other.data(), over_dy.data()) == g &&
             over_dy == dresidual && other == dx,
         "dresidual over dy differs");
  expect(op.backward(op.dy, x_copy, residual_copy, mean, rstd, x_copy.data(), residual_copy.data()) == g &&
             x_copy == dx && residual_copy == dresidual,
         "dx over x and dresidual over residual differ");
  if (on.site.threshold == 0) {
    over_dy = op.dy;
    expect(op.backward(over_dy, op.x, op.residual, mean, rstd, over_dy.data(), over_dy.data()) == g && over_dy == dx,
           "dx and dresidual in the memory of dy differ");
  }
}

struct RegionEmbedding {
  Case on;
  Values x, feature_bias, boxes, location_weight, location_bias, weight, shift, dy;

  RegionEmbedding(const Case& on, Random& random)
      : on(on),
        x(random.values(on.dtype, on.size())),
        feature_bias(random.values(on.dtype, on.width)),
        boxes(random.values(kFloat32, on.rows * 5)),
        location_weight(random.values(on.dtype, on.width * 5)),
        location_bias(random.values(on.dtype, on.width)),
        weight(random.values(on.dtype, on.width, 0.2, 1)),
        shift(random.values(on.dtype, on.width)),
        dy(random.values(on.dtype, on.size())) {}

  Norm norm() const {
    Doubles z = doubles(on.size());
    for (int64_t r = 0; r < on.rows; ++r)
      for (int64_t c = 0; c < on.width; ++c) {
        double sum = x[r * on.width + c] + feature_bias[c] + location_bias[c];
        for (int64_t k = 0; k < 5; ++k) sum += boxes[r * 5 + k] * location_weight[c * 5 + k];
        z[static_cast<size_t>(r * on.width + c)] = sum;
      }
    return Norm(on.rows, on.width, std::move(z));
  }

  void forward(void* y, float* mean, float* rstd) {
    stopgo_region_embedding_forward(on.dtype, on.rows, on.width, x.data(), feature_bias.data(), boxes.floats(),
                                    location_weight.data(), location_bias.data(), weight.data(), shift.data(),
                                    on.key.data(), on.row.data(), on.site.seed, on.site.step, on.site.site,
                                    on.site.threshold, static_cast<float>(kEps), y, mean, rstd);
  }

  // dfeature_bias, dlocation_weight, dweight, dshift.
  std::vector<Values> backward(const Values& dy_, const Values& x_, Values& mean, Values& rstd, void* dx) {
    std::vector<Values> g{{on.dtype, on.width}, {on.dtype, on.width * 5}, {on.dtype, on.width}, {on.dtype, on.width}};
    stopgo_region_embedding_backward(
        on.dtype, on.rows, on.width, dy_.data(), x_.data(), feature_bias.data(), boxes.floats(), location_weight.data(),
        location_bias.data(), weight.data(), mean.floats(), rstd.floats(), on.key.data(), on.row.data(), on.site.seed,
        on.site.step, on.site.site, on.site.threshold, dx, g[0].data(), g[1].data(), g[2].data(), g[3].data());
    return g;
  }
};

void check_region_embedding(const Case& on, Random& random) {
  RegionEmbedding op(on, random);
  const Norm norm = op.norm();
  Doubles y_truth = doubles(on.size()), dy = doubles(on.size());
  for (int64_t i = 0; i < on.size(); ++i) {
    const double mask = on.mask(i / on.width, i % on.width);
    y_truth[static_cast<size_t>(i)] =
        (norm.normal[static_cast<size_t>(i)] * op.weight[i % on.width] + op.shift[i % on.width]) * mask;
    dy[static_cast<size_t>(i)] = op.dy[i] * mask;
  }
  Values y(on.dtype, on.size()), again(on.dtype, on.size()), mean(kFloat32, on.rows), rstd(kFloat32, on.rows);
  op.forward(y.data(), mean.floats(), rstd.floats());
  op.forward(again.data(), nullptr, nullptr);
  expect_close("y", y, y_truth, on.width < 16 ? 500 : 64);
  expect(again == y, "without mean: another y");

  Doubles dweight = doubles(on.width), dshift = doubles(on.width), dbias = doubles(on.width),
          dlocation = doubles(on.width * 5);
  const Doubles dz = norm.backward(dy, op.weight, dweight, dshift);
  for (int64_t i = 0; i < on.size(); ++i) {
    dbias[static_cast<size_t>(i % on.width)] += dz[static_cast<size_t>(i)];
    for (int64_t k = 0; k < 5; ++k)
      dlocation[static_cast<size_t>(i % on.width * 5 + k)] +=
          dz[static_cast<size_t>(i)] * op.boxes[i / on.width * 5 + k];
  }
  Values dx(on.dtype, on.size());
  const auto g = op.backward(op.dy, op.x, mean, rstd, dx.data());
  if (on.width > 5) {
    expect_close("dx", dx, dz, 200);
    expect_close("dfeature_bias", g[0], dbias, 400);
    expect_close("dlocation_weight", g[1], dlocation, 400);
    expect_close("dweight", g[2], dweight, 200);
  }
  expect_close("dshift", g[3], dshift, 64);

  Values over_dy = op.dy, over_x = op.x;
  expect(op.backward(over_dy, op.x, mean, rstd, over_dy.data()) == g && over_dy == dx, "dx over dy differs");
  expect(op.backward(op.dy, over_x, mean, rstd, over_x.data()) == g && over_x == dx, "dx over x differs");
}

}  // namespace

TEST(bias_dropout_residual_layernorm) {
  Random random(3);
  for_cases(random, check_bias_dropout_residual);
}

TEST(bias_dropout_residual_layernorm_on_two_threads) {
  Random random(4);
  const Case on{kBFloat16, 131, 1024, {1, 2, 3, 6554}, random.keys(131), random.keys(131)};
  const BiasDropoutResidual op(on, random);
  expect_same_bits_on_two_threads([&] {
    Values y(on.dtype, on.size()), mean(kFloat32, on.rows), rstd(kFloat32, on.rows), dx = y, dresidual = y;
    op.forward(op.x, op.residual, y.data(), mean.floats(), rstd.floats());
    const auto g = op.backward(op.dy, op.x, op.residual, mean, rstd, dx.data(), dresidual.data());
    return std::vector<Values>{y, mean, rstd, dx, dresidual, g.dbias, g.dweight, g.dshift};
  });
}

TEST(layernorm_of_a_large_mean) {  // would lose every digit if the variance were E[z^2] - E[z]^2
  Random random(5);
  const Case on{kFloat32, 3, 1024, {1, 2, 3, 0}, random.keys(3), random.keys(3)};
  BiasDropoutResidual op(on, random);
  for (int64_t i = 0; i < on.size(); ++i) op.residual.set(i, op.residual[i] + 4096);
  const Norm norm = op.norm();
  Values y(on.dtype, on.size());
  op.forward(op.x, op.residual, y.data(), nullptr, nullptr);
  double worst = 0;
  for (int64_t i = 0; i < on.size(); ++i)
    worst = std::max(worst, std::fabs(y[i] - norm.normal[static_cast<size_t>(i)] * op.weight[i % on.width] -
                                      op.shift[i % on.width]));
  expect(worst < 2e-3, text("off by ", worst));
}

TEST(region_embedding) {
  Random random(6);
  for_cases(random, check_region_embedding);
}

TEST(region_embedding_on_two_threads) {
  Random random(7);
  const Case on{kBFloat16, 131, 1024, {1, 2, 3, 6554}, random.keys(131), random.keys(131)};
  RegionEmbedding op(on, random);
  expect_same_bits_on_two_threads([&] {
    Values y(on.dtype, on.size()), mean(kFloat32, on.rows), rstd(kFloat32, on.rows), dx = y;
    op.forward(y.data(), mean.floats(), rstd.floats());
    auto results = op.backward(op.dy, op.x, mean, rstd, dx.data());
    for (const Values& value : {y, mean, rstd, dx}) results.push_back(value);
    return results;
  });
}
