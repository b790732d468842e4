// The flat C interface of the native kernels. No torch headers: one build serves every torch.
//
// Conventions
// - `dtype`: 0 float32, 1 bfloat16, 2 float16: of every `void*` argument of the call. Sums and softmax are in float32 inside.
// - Matrices are row-major; where no stride is given, rows stand one after the other. Strides count elements.
// - Dropout: `threshold` 0 means none. A value is kept if its 16-bit lane is at least `threshold`; kept values are multiplied by
//   65536 / (65536 - threshold). Which lane: the definition in kernels/dropout.py. row_key, row_index: int64 [rows].
// - Outputs are overwritten. A gradient of a vector ([width]) is summed over rows in an order that does not depend on the
//   number of threads: the same bits on one thread or two.
// - Every function may be called with rows = 0. Nothing is allocated that outlives a call but per-thread scratch, which
//   grows to the largest call and stays.
#pragma once
#include <cstdint>

extern "C" {

int32_t stopgo_abi_version();

// The instruction set that this library was compiled for: "amx", "avx512bf16", "avx512", "avx2" or "portable".
const char* stopgo_isa();

// row_key, row_index: [rows]; out: uint8 [rows, width], 1 = kept. `tile`: see kernels/dropout.py.
void stopgo_keep_mask(uint32_t seed, uint32_t step, uint32_t site, uint32_t threshold, const int64_t* row_key,
                      const int64_t* row_index, int64_t rows, int64_t width, int64_t tile, uint8_t* out);

// y = dropout(x), tile = the row rounded up to eight columns; the backward is the same call on the gradient. y may be x.
void stopgo_dropout(int32_t dtype, int64_t rows, int64_t width, const void* x, const int64_t* row_key,
                    const int64_t* row_index, uint32_t seed, uint32_t step, uint32_t site, uint32_t threshold, void* y);

// y = LayerNorm(dropout(x + bias) + residual) * weight + shift. mean, rstd: float32 [rows], of the sum before the norm.
// mean and rstd may be null (evaluation). y may be x or residual.
void stopgo_bias_dropout_residual_layernorm_forward(
    int32_t dtype, int64_t rows, int64_t width, const void* x, const void* bias, const void* residual, const void* weight,
    const void* shift, const int64_t* row_key, const int64_t* row_index, uint32_t seed, uint32_t step, uint32_t site,
    uint32_t threshold, float eps, void* y, float* mean, float* rstd);

// The sum is computed again from x and residual, the mask is drawn again. dx may be x or dy; dresidual may be dy or residual;
// without dropout dx and dresidual may be the same memory (they are equal then). dbias = column sums of dx.
void stopgo_bias_dropout_residual_layernorm_backward(
    int32_t dtype, int64_t rows, int64_t width, const void* dy, const void* x, const void* bias, const void* residual,
    const void* weight, const float* mean, const float* rstd, const int64_t* row_key, const int64_t* row_index,
    uint32_t seed, uint32_t step, uint32_t site, uint32_t threshold, void* dx, void* dresidual, void* dbias,
    void* dweight, void* dshift);

// y = z Phi(z), z = x + bias, the erf form. y may be x.
void stopgo_bias_gelu_forward(int32_t dtype, int64_t rows, int64_t width, const void* x, const void* bias, void* y);

// dx = dy * gelu'(x + bias); y (null or [rows, width]) is the forward's output, computed again: the product that follows
// needs it. dx may be dy, y may be x. dbias = column sums of dx.
void stopgo_bias_gelu_backward(int32_t dtype, int64_t rows, int64_t width, const void* dy, const void* x,
                               const void* bias, void* dx, void* dbias, void* y);

// out [width] = column sums of x [rows, width], whose rows are x_stride apart: the gradient of a bias.
void stopgo_column_sums(int32_t dtype, int64_t rows, int64_t width, const void* x, int64_t x_stride, void* out);

// out [columns, rows] = the transpose of x [rows, columns], whose rows are x_stride apart; 16-bit values of either dtype.
void stopgo_transpose(int64_t rows, int64_t columns, const void* x, int64_t x_stride, void* out);

// y = dropout(LayerNorm(x + feature_bias + boxes location_weight^T + location_bias) * weight + shift).
// boxes: float32 [rows, 5]; location_weight: [width, 5].
void stopgo_region_embedding_forward(
    int32_t dtype, int64_t rows, int64_t width, const void* x, const void* feature_bias, const float* boxes,
    const void* location_weight, const void* location_bias, const void* weight, const void* shift, const int64_t* row_key,
    const int64_t* row_index, uint32_t seed, uint32_t step, uint32_t site, uint32_t threshold, float eps, void* y,
    float* mean, float* rstd);

// dx may be dy or x. dfeature_bias = column sums of dx (and dlocation_bias equals it: it is not written twice).
void stopgo_region_embedding_backward(
    int32_t dtype, int64_t rows, int64_t width, const void* dy, const void* x, const void* feature_bias,
    const float* boxes, const void* location_weight, const void* location_bias, const void* weight, const float* mean,
    const float* rstd, const int64_t* row_key, const int64_t* row_index, uint32_t seed, uint32_t step, uint32_t site,
    uint32_t threshold, void* dx, void* dfeature_bias, void* dlocation_weight, void* dweight, void* dshift);

// One direction of attention: items of the query rows read items of the key rows, item by item.
struct StopgoDirection {
  const void *q, *k, *v;  // [rows, heads * head_dim], rows q_stride, k_stride, v_stride apart
  int64_t q_stride, k_stride, v_stride;
  const int32_t *cu_q, *cu_k;  // [n_items + 1]
  const int64_t* item_key;     // [n_items], of dropout
  uint32_t seed, step, site, threshold;
  void* out;  // [query rows, heads * head_dim], rows out_stride apart; written by forward, read by backward
  int64_t out_stride;
  float* lse;  // [query rows, heads]: log of the sum of exponentials, natural logarithm; may be null in forward
  // Backward only:
  const void* dout;
  int64_t dout_stride;
  void *dq, *dk, *dv;
  int64_t dq_stride, dk_stride, dv_stride;
};

// out = dropout(softmax(q k^T * scale)) v for every direction, item and head, scale = 1 / sqrt(head_dim). The dropout counter's row is
// (head << 16) + query row within the item, its tile 64 columns. Items may have any number (at least 1) of rows.
void stopgo_attention_forward(int32_t dtype, int32_t n_directions, const StopgoDirection* directions, int64_t n_items,
                              int64_t heads, int64_t head_dim);
void stopgo_attention_backward(int32_t dtype, int32_t n_directions, const StopgoDirection* directions, int64_t n_items,
                               int64_t heads, int64_t head_dim);

// The products of y = x W^T + b in bfloat16, only in a library whose instruction set is "amx". x [rows, depth],
// W [width, depth] contiguous, bias [width] or null, y [rows, width]; widths and depths are multiples of 32. Each result is
// rounded once, from sums in float32 along the depth whose order does not depend on the number of threads.
void stopgo_projection_forward(int64_t rows, int64_t width, int64_t depth, const void* x, int64_t x_stride,
                               const void* w, const void* bias, void* y, int64_t y_stride);
// dx [rows, width] = dy W, or dx += dy W with `add`; dy [rows, depth], W [depth, width].
void stopgo_projection_input_gradient(int64_t rows, int64_t width, int64_t depth, const void* dy, int64_t dy_stride,
                                      const void* w, void* dx, int64_t dx_stride, int32_t add);
// inner [rows, width] = x W^T and y = gelu(inner + bias), the activation computed while the tiles multiply.
void stopgo_projection_gelu_forward(int64_t rows, int64_t width, int64_t depth, const void* x, int64_t x_stride,
                                    const void* w, const void* bias, void* inner, void* y);
// dinner [rows, width] = (dy W) gelu'(inner + bias), and inner becomes gelu(inner + bias); dy [rows, depth], W [depth, width].
void stopgo_projection_gelu_gradient(int64_t rows, int64_t width, int64_t depth, const void* dy, int64_t dy_stride,
                                     const void* w, const void* bias, void* inner, void* dinner);
// dw [width, depth] = dy^T x, and dbias (null or [width]) the column sums of dy; dy [rows, width], x [rows, depth].
void stopgo_projection_weight_gradient(int64_t rows, int64_t width, int64_t depth, const void* dy, int64_t dy_stride,
                                       const void* x, int64_t x_stride, void* dw, void* dbias);

// Multi-label loss of logits [examples, classes] against sparse soft labels (kernels/soft_label_bce.py): example b owns entries
// offsets[b]:offsets[b + 1]. loss: float32 [examples], unscaled; score: float32 [examples];
// dlogits (null or [examples, classes]): (sigmoid(z) - t) / examples.
void stopgo_soft_label_bce(int32_t dtype, int64_t examples, int64_t classes, const void* logits, const int64_t* offsets,
                           const int64_t* labels, const float* scores, float* loss, float* score, void* dlogits);

// Rows of masked-region modelling: loss[r] = sum_c t (log t - log softmax(z + bias)_c), z = logits [rows, classes] without bias,
// target: target_dtype [rows, classes]. Where `gradient` is 1, logits are overwritten by scale * (softmax(z) * sum(t) - t).
// dbias: null, or float32 [classes], to which the column sums of that gradient are added.
void stopgo_divergence_rows(int32_t dtype, int64_t rows, int64_t classes, void* logits, const void* bias,
                            int32_t target_dtype, const void* target, float scale, int32_t gradient, float* loss,
                            float* dbias);

// Rows of masked-word modelling: loss[r] = -log softmax(z + bias)_label; the rest as above.
void stopgo_cross_entropy_rows(int32_t dtype, int64_t rows, int64_t classes, void* logits, const void* bias,
                               const int64_t* labels, float scale, int32_t gradient, float* loss, float* dbias);

// Sum of squares of n values, in a fixed order, float64.
double stopgo_square_sum(int32_t dtype, int64_t n, const void* x);

// AdamW as published (spec section 4.4), one pass: m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
// p = p - lr m / (sqrt(v) + eps); p = p - lr * weight_decay * p. g: dtype [n]; p, m, v: float32 [n].
// weights: null, or dtype [n]: p rounded to nearest even. Nothing changes where *skipped is not 0.
void stopgo_adamw(int32_t dtype, int64_t n, const void* gradient, float* p, float* m, float* v, void* weights, double lr,
                  double beta1, double beta2, double eps, double weight_decay, const float* skipped);

}  // extern "C"
