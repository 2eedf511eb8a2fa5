/* The C interface of the dsp-kernels core. Plain structs, pointers and sizes; no exception leaves it.
 *
 * Every function that can fail returns a dsp_status; dsp_last_error() then gives the reason as text, per
 * thread, until the next failing call on that thread. Nothing is written to an output when the arguments are
 * refused: every size, offset and index is checked against the plan before memory is touched. */
#ifndef DSP_H_
#define DSP_H_

#include <stdint.h>

#if defined(__GNUC__)
#define DSP_API __attribute__((visibility("default")))
#else
#define DSP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define DSP_ABI_VERSION 1

typedef enum dsp_status {
  DSP_OK = 0,
  DSP_INVALID_ARGUMENT = 1,
  DSP_OUT_OF_MEMORY = 2,
  DSP_INTERNAL = 3
} dsp_status;

typedef enum dsp_activation { DSP_ACT_NONE = 0, DSP_ACT_RELU = 1, DSP_ACT_RELU6 = 2 } dsp_activation;

/* The plan says which filters read which channels: int32 words,
 *   [0] DSP_PLAN_MAGIC  [1] in_channels  [2] out_channels  [3] n_groups  [4] pairs (sum of filters x
 * channels) [5] length of the plan  [6] number of live filters  [7] 0 then per group 5 words: n_channels,
 * n_filters, where its channel list starts, where its filter list starts, where its weights start in pairs;
 * then all channel lists, then all filter lists, in group order. Packed weights: groups in order, each
 * row-major (filters, channels, kernel_h, kernel_w). */
#define DSP_PLAN_MAGIC 0x44535031
#define DSP_PLAN_HEADER 8
#define DSP_PLAN_GROUP 5

/* height and width are the input's; out = (in + 2 padding - dilation (kernel - 1) - 1) / stride + 1. */
typedef struct dsp_conv2d_shape {
  int64_t batch, height, width;
  int64_t kernel_h, kernel_w;
  int64_t stride_h, stride_w;
  int64_t padding_h, padding_w;
  int64_t dilation_h, dilation_w;
} dsp_conv2d_shape;

DSP_API int32_t dsp_abi_version(void);
DSP_API const char* dsp_last_error(void);
/* "avx512", "avx2", "neon" or "generic": what the kernels run as on this machine. */
DSP_API const char* dsp_cpu_isa(void);

/* Permuted grouped convolution, float32, NCHW contiguous:
 *   out[n, f] = act(bias[f] + residual[n, f] + sum over the channels c of f's group of x[n, c] * w[f, c])
 * bias (out_channels values) and residual (the size of out) may be null. A filter in no group is dead:
 * out[n, f] = act(bias[f] + residual[n, f]). out may not overlap x; residual may be out.
 * prepared is 1 when the weights come from dsp_conv2d_prepare, else 0.
 * threads >= 1 is the most threads used; the result does not depend on it. */
DSP_API dsp_status dsp_conv2d_forward(const dsp_conv2d_shape* shape, const float* x, int64_t x_numel,
                                      const float* weight, int64_t weight_numel, const int32_t* plan,
                                      int64_t plan_numel, const float* bias, const float* residual,
                                      float* out, int64_t out_numel, int32_t activation, int32_t prepared,
                                      int32_t threads);

/* Lays the packed weights out as the kernels of this machine want them: the same number of values in another
 * order, good for every stride, padding and dilation, to be given to dsp_conv2d_forward with prepared = 1.
 * The order depends on the machine: prepared weights are not for storing. */
DSP_API dsp_status dsp_conv2d_prepare(int64_t kernel_h, int64_t kernel_w, const float* weight,
                                      int64_t weight_numel, const int32_t* plan, int64_t plan_numel,
                                      float* prepared, int64_t prepared_numel);

/* The gradient of sum(grad * conv(x, w)) for x: (batch, in_channels, height, width); unread channels get 0.
 */
DSP_API dsp_status dsp_conv2d_grad_input(const dsp_conv2d_shape* shape, const float* grad, int64_t grad_numel,
                                         const float* weight, int64_t weight_numel, const int32_t* plan,
                                         int64_t plan_numel, float* grad_x, int64_t grad_x_numel,
                                         int32_t threads);

/* The gradient of sum(grad * conv(x, w)) for the packed w. */
DSP_API dsp_status dsp_conv2d_grad_weight(const dsp_conv2d_shape* shape, const float* grad,
                                          int64_t grad_numel, const float* x, int64_t x_numel,
                                          const int32_t* plan, int64_t plan_numel, float* grad_w,
                                          int64_t weight_numel, int32_t threads);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* DSP_H_ */
