// The transpose of 16-bit values.
#include "check.h"

using namespace check;

TEST(transpose) {
  Random random(18);
  for (int64_t rows : {0, 1, 2, 7, 8, 31, 32, 33, 101, 257})
    for (int64_t columns : {1, 5, 8, 63, 64, 65, 130, 768})
      for (int64_t gap : {0, 3}) {
        where = text(rows, " x ", columns, ", ", gap, " apart");
        const int64_t stride = columns + gap;
        const Values x = random.values(kBFloat16, rows == 0 ? 0 : (rows - 1) * stride + columns);
        Values truth(kBFloat16, rows * columns), out(kBFloat16, rows * columns);
        for (int64_t r = 0; r < rows; ++r)
          for (int64_t c = 0; c < columns; ++c) truth.set(c * rows + r, x[r * stride + c]);
        stopgo_transpose(rows, columns, x.data(), stride, out.data());
        expect(out == truth, "not the transpose");
      }
}
