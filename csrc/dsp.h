/* The C interface of the dsp-kernels core. Plain structs, pointers and sizes; no exception leaves it.
 *
 * Every function that can fail returns a dsp_status; dsp_last_error() then gives the reason as text, per
 * thread, until the next failing call on that thread. Nothing is written to an output when the arguments are
 * refused: every size, offset and index is checked against the plan before memory is touched. */
#ifndef DSP_H_
#define DSP_H_

#include "runtime/dsp_runtime.h"

#ifdef __cplusplus
extern "C" {
#endif

#define DSP_ABI_VERSION 9

/* DSP_ACT_NONE = 0, DSP_ACT_RELU, ...: the rows of core/activations.def. */
typedef enum dsp_activation_kind {
#define DSP_ACTIVATION(NAME, name, code, parameters) DSP_ACT_##NAME = code,
#include "core/activations.def"
#undef DSP_ACTIVATION
} dsp_activation_kind;

#define DSP_ACT_PARAMETERS 2 /* that an activation may have, at most */

typedef struct dsp_activation {
  int32_t kind;                         /* a dsp_activation_kind */
  float parameters[DSP_ACT_PARAMETERS]; /* as many as it takes; the rest is not read */
} dsp_activation;

typedef struct dsp_activation_info {
  const char* name;
  int32_t code, parameters;
} dsp_activation_info;

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
/* The table of activations; null beyond its end. */
DSP_API int32_t dsp_activation_count(void);
DSP_API const dsp_activation_info* dsp_activation_at(int32_t index);
/* Multiply-adds on registers alone, for a caller with a clock: the most that one core can do. Returns how
 * many FLOPs they were. */
DSP_API int64_t dsp_fma_rounds(int64_t rounds);

/* GOMP_parallel of an OpenMP runtime. */
typedef void (*dsp_team_runner)(void (*body)(void*), void* context, unsigned threads, unsigned flags);
/* The core's loops run on teams of this runtime from now on (in a forked child, as with NULL, on threads of
 * the core's own), so that its threads, which go on spinning after a loop, are not others than the core's.
 * Each calling thread has a team. Not to be called in a fork of a process that used the runtime. */
DSP_API void dsp_use_team(dsp_team_runner runner);

/* Permuted grouped convolution, float32, NCHW contiguous:
 *   out[n, f] = act(bias[f] + residual[n, f] + sum over the channels c of f's group of x[n, c] * w[f, c])
 * bias (out_channels values) and residual (the size of out) may be null. A filter in no group is dead:
 * out[n, f] = act(bias[f] + residual[n, f]). out may not overlap x; residual may be out. activation may be
 * null: none.
 * prepared is 1 when the weights come from dsp_conv2d_prepare, else 0.
 * threads >= 1 is the most threads used; the result does not depend on it. */
DSP_API dsp_status dsp_conv2d_forward(const dsp_conv2d_shape* shape, const float* x, int64_t x_numel,
                                      const float* weight, int64_t weight_numel, const int32_t* plan,
                                      int64_t plan_numel, const float* bias, const float* residual,
                                      float* out, int64_t out_numel, const dsp_activation* activation,
                                      int32_t prepared, int32_t threads);

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

/* A program: a whole network as a list of steps over one preallocated memory, run image by image so that the
 * activations stay in the second-level cache. float32, CPU. The description is int64 words,
 *   [0] DSP_PROGRAM_MAGIC  [1] 2  [2] number of inputs  [3] number of steps  [4] number of outputs
 *   [5] number of words
 * then channels, height and width of each input, the values that are the outputs, and the steps one after the
 * other: [operation, number of words of this step, its fields]. The first values are the inputs, step i makes
 * value (number of inputs) + i; outputs are values of steps. Operations, their fields and what these mean:
 * program/steps.def. */
#define DSP_PROGRAM_MAGIC 0x44535047
#define DSP_PROGRAM_VERSION 2
#define DSP_PROGRAM_HEADER 6

typedef enum dsp_program_op {
#define DSP_STEP(NAME, name, code) DSP_OP_##NAME = code,
#include "program/steps.def"
} dsp_program_op;

typedef enum dsp_field_kind {
  DSP_FIELD_INT = 0,          /* a number within the field's bounds */
  DSP_FIELD_VALUE = 1,        /* a value that is there before the step */
  DSP_FIELD_MAYBE_VALUE = 2,  /* one, or -1 */
  DSP_FIELD_VALUES = 3,       /* how many, then each; the last field */
  DSP_FIELD_ACTIVATION = 4,   /* its code, then the place in `floats` of its parameters where it has any */
  DSP_FIELD_FLOATS = 5,       /* the first one's place in `floats` */
  DSP_FIELD_MAYBE_FLOATS = 6, /* that, or -1 */
  DSP_FIELD_PLAN = 7          /* the number of its words, then these */
} dsp_field_kind;

typedef struct dsp_step_field {
  const char* name;
  int32_t kind;        /* a dsp_field_kind */
  int64_t least, most; /* of a number */
} dsp_step_field;

typedef struct dsp_step_info {
  const char* name;
  int32_t code;
  int32_t fields_numel;
  const dsp_step_field* fields;
} dsp_step_info;

/* The table of steps; null beyond its end. */
DSP_API int32_t dsp_step_count(void);
DSP_API const dsp_step_info* dsp_step_at(int32_t index);

typedef struct dsp_program dsp_program;

/* Copies what it needs from words and floats. */
DSP_API dsp_status dsp_program_create(const int64_t* words, int64_t words_numel, const float* floats,
                                      int64_t floats_numel, dsp_program** program);
/* The same from floats in several pieces: places count through all of them as if each began where the one
 * before it ends. What a field names lies in one. */
DSP_API dsp_status dsp_program_create_from(const int64_t* words, int64_t words_numel,
                                           const float* const* floats, const int64_t* floats_numel,
                                           int64_t pieces, dsp_program** program);
/* One array for each input and output, of as many elements as `in_numel` and `out_numel` say:
 * (batch, channels, height, width), contiguous. Any number of threads may run one program at the same time.
 */
DSP_API dsp_status dsp_program_run(dsp_program* program, const float* const* in, const int64_t* in_numel,
                                   float* const* out, const int64_t* out_numel, int64_t batch,
                                   int32_t threads);
/* How many inputs and outputs there are; 0 for a null program. */
DSP_API int64_t dsp_program_inputs(const dsp_program* program);
DSP_API int64_t dsp_program_outputs(const dsp_program* program);
/* channels, height and width of one. */
DSP_API dsp_status dsp_program_input(const dsp_program* program, int64_t index, int64_t shape[3]);
DSP_API dsp_status dsp_program_output(const dsp_program* program, int64_t index, int64_t shape[3]);
DSP_API dsp_status dsp_program_memory_use(const dsp_program* program, dsp_program_memory* memory);

/* What a program runs, in that order: copies between layouts are steps of operation 0. */
typedef struct dsp_program_step {
  int32_t operation;
  int32_t channels_last; /* how its result lies */
  int64_t shape[3];      /* channels, height and width of its result */
  int64_t macs;          /* of a convolution: what its structure needs */
  double seconds;        /* of the thread's clock */
} dsp_program_step;

/* Runs one image, all ones, on the calling thread and says what each step took. Fills `steps`, which has room
 * for steps_numel of them; `count` gets how many there are. With steps_numel 0 nothing runs. */
DSP_API dsp_status dsp_program_profile(dsp_program* program, dsp_program_step* steps, int64_t steps_numel,
                                       int64_t* count);
/* No run may be under way. A null program is ignored. */
DSP_API void dsp_program_destroy(dsp_program* program);
/* A program file, for dsp_model_load, of a description whose inputs and outputs are so many of `tensors`,
 * inputs first: with file = null sets needed, then with so many bytes writes them. The steps are not looked
 * into. */
DSP_API dsp_status dsp_program_file(const int64_t* words, int64_t words_numel, const float* floats,
                                    int64_t floats_numel, const dsp_tensor_info* tensors, int32_t inputs,
                                    int32_t outputs, uint8_t* file, int64_t bytes, int64_t* needed);

/* Batch normalisation in training, float32, (batch, channels, pixels) contiguous:
 *   out = act((x - mean) / sqrt(variance + eps) * weight + bias + residual)
 * with the mean and the (biased) variance of each channel over batch and pixels, which are given back.
 * numel is the number of elements of x and of every tensor of its size; weight, bias, mean and variance have
 * one value a channel. weight (1), bias (0) and residual (0) may be null. activation: none or relu.
 * blank may be null: one byte a channel, not 0 where x is 0 throughout, so that it need not be read. The
 * result does not depend on threads. */
typedef struct dsp_norm_shape {
  int64_t batch, channels, pixels;
} dsp_norm_shape;

DSP_API dsp_status dsp_batch_norm_forward(const dsp_norm_shape* shape, const float* x, int64_t numel,
                                          const float* weight, const float* bias, const float* residual,
                                          const uint8_t* blank, double eps, int32_t activation, float* mean,
                                          float* variance, float* out, int32_t threads);

/* The gradients of sum(grad * out), mean and variance as the forward gave them. y is the forward's output,
 * needed where there was a residual and an activation, else null. Each output may be null; grad_x is left
 * as it is in blank channels. */
DSP_API dsp_status dsp_batch_norm_backward(const dsp_norm_shape* shape, const float* grad, const float* x,
                                           const float* y, int64_t numel, const float* weight,
                                           const float* bias, const float* mean, const float* variance,
                                           const uint8_t* blank, double eps, int32_t activation,
                                           float* grad_x, float* grad_residual, float* grad_weight,
                                           float* grad_bias, int32_t threads);

/* Group penalty of all layers of a network in one pass over their weights; the mathematics is in
 * dsp_kernels/assignment/reference.py. The table has DSP_LASSO_WORDS int64 words for each layer:
 *   [0] weight  [1] direction D of the weights or 0  [2] output for the weights or 0 (may be the weight)
 *   [3] where the weights are kept as they were, or 0  [4] elements of the weight  [5] filters O
 *   [6] input channels C  [7] taps K  [8] 0: (O, C, K) in memory, 1: (O, K, C)
 *   [9] log-probabilities (G, O)  [10] elements between their rows  [11] [12] their direction E or 0
 *   [13] [14] output (G, O) for them or 0
 * (addresses as integers), and two doubles: scale, amount. With R the penalty at scale 1:
 *   PENALTY        penalties = scale R
 *   BACKWARD       outputs amount dR/dW and amount dR/dl; penalties as above
 *   HESSIAN        outputs amount times the Hessian product along (D, E); penalties = scale times the
 *                  derivative of R along (D, E)
 *   SHRINK         weights <- W - amount dR/dW
 *   PROXIMAL       weights <- the minimiser of |X - W|^2 / 2 + amount R(X), for hard log-probabilities
 *   STEP_GRADIENT  scale times [dR/dl at W' = W - amount dR/dW, plus, where D is given, the derivative for l
 * of <dR/dW(W), D - amount dR/dW(W')>] element is 0 for float and 1 for double, of all tensors; penalties
 * (one a layer) may be null. The result does not depend on threads. */
#define DSP_LASSO_WORDS 15

typedef enum dsp_lasso_op {
  DSP_LASSO_PENALTY = 0,
  DSP_LASSO_BACKWARD = 1,
  DSP_LASSO_HESSIAN = 2,
  DSP_LASSO_SHRINK = 3,
  DSP_LASSO_PROXIMAL = 4,
  DSP_LASSO_STEP_GRADIENT = 5
} dsp_lasso_op;

DSP_API dsp_status dsp_lasso(int32_t operation, int32_t element, const int64_t* words, int64_t words_numel,
                             const double* numbers, int64_t numbers_numel, int64_t groups, double* penalties,
                             int32_t threads);

/* The convolution on a CUDA device, channels last (NHWC), forward and both gradients. Pointers to tensors are
 * addresses of the device's memory; all work is put on `stream` of `device`, and the device that was current
 * is so again on return. The kernels read from a table how to cut the work; it depends on the plan, the
 * shape, the operation and the precision, and is made once on the host (this needs no device):
 *   dsp_cuda_conv2d_table with words = null sets needed, then with words of that length writes them;
 *   the caller keeps the words and a copy of them in the device's memory.
 * operation: 0 forward, 1 gradient of the input, 2 gradient of the weight. precision: of all tensors, 0
 * float16, 1 bfloat16, 2 float32 multiplied as TF32, 3 float32; sums are float32. fill: 0 the table chooses
 * how channels are read, 1 by aligned units of 16 bytes where the number of channels allows it, 2 one by one.
 * blocks_wanted >= 1: how many thread blocks keep the device busy; below it sums are split. The result
 * depends on it, and on nothing else but the arguments: no atomics. */
DSP_API dsp_status dsp_cuda_conv2d_table(int32_t operation, int32_t precision, const dsp_conv2d_shape* shape,
                                         const int32_t* plan, int64_t plan_numel, int32_t fill,
                                         int32_t blocks_wanted, int32_t* words, int64_t words_numel,
                                         int64_t* needed);

typedef struct dsp_cuda_sizes {
  int64_t prepared_bytes;   /* laid out weights; 0 for the gradient of the weight */
  int64_t workspace_floats; /* may be 0 */
  int64_t blocks, splits;   /* of the main kernel */
  int64_t shared_bytes;     /* of a block */
  int64_t multiply_adds;    /* that the matrix instructions make, padding included */
} dsp_cuda_sizes;
/* Reads all of the table, and refuses one with anything out of place; the calls read its header alone. */
DSP_API dsp_status dsp_cuda_conv2d_sizes(const int32_t* table, int64_t table_numel, dsp_cuda_sizes* sizes);

typedef struct dsp_cuda_work {
  int64_t multiply_adds; /* that the matrix instructions make, padding included */
  double effort;         /* these, and on top the copies, in multiply-adds that take as long by the planner */
  int64_t weights;       /* elements of the laid out weight */
  int64_t blocks;        /* before sums are split */
  int64_t most_splits;   /* into how many shares a sum can go */
  int64_t gathered;      /* groups that are read channel by channel, of */
  int64_t groups;        /* those that have filters */
  int64_t halo_rows;     /* pixels that a block copies for */
  int64_t phase_taps;    /* so many taps of its outputs */
} dsp_cuda_work;
/* What a table of operation 0 makes of the work, for a cost model. Reads all of it, as dsp_cuda_conv2d_sizes.
 */
DSP_API dsp_status dsp_cuda_conv2d_work(const int32_t* table, int64_t table_numel, dsp_cuda_work* work);

typedef struct dsp_cuda_call {
  int32_t device;
  void* stream;         /* a cudaStream_t */
  const int32_t* table; /* on the host, as dsp_cuda_conv2d_table wrote it */
  int64_t table_numel;
  const int32_t* device_table; /* the same words in the device's memory */
} dsp_cuda_call;

/* DSP_NO_DEVICE with a text where there is no driver or no device, or the library was built without CUDA. */
DSP_API dsp_status dsp_cuda_device_count(int32_t* count);
/* Lays the packed weights out for the table's operation (0 or 1). prepared: 16-byte aligned. */
DSP_API dsp_status dsp_cuda_conv2d_prepare(const dsp_cuda_call* call, const void* weight,
                                           int64_t weight_numel, void* prepared, int64_t prepared_bytes);
/* out = act(conv(x, w) + bias + residual) for a table of operation 0; for operation 1 x is the gradient of
 * the output, out that of the input, bias and residual null. bias: a value for each output channel, or null
 * with bias_numel 0; residual: as out, which it may be, or null with residual_numel 0. */
DSP_API dsp_status dsp_cuda_conv2d_run(const dsp_cuda_call* call, const void* x, int64_t x_numel,
                                       const void* prepared, int64_t prepared_bytes, const void* bias,
                                       int64_t bias_numel, const void* residual, int64_t residual_numel,
                                       void* out, int64_t out_numel, float* workspace,
                                       int64_t workspace_numel, int32_t activation);
DSP_API dsp_status dsp_cuda_conv2d_grad_weight(const dsp_cuda_call* call, const void* grad,
                                               int64_t grad_numel, const void* x, int64_t x_numel,
                                               void* grad_weight, int64_t weight_numel, float* workspace,
                                               int64_t workspace_numel);

/* The group penalty of all layers of a network on a CUDA device: the operations of dsp_lasso but the Hessian
 * product. As there, a weight is O x C x K or, tap-major, O x K x C. How the work is cut is a table of int64
 * words for the layers' shapes, made on the host (this needs no device):
 *   shapes: DSP_CUDA_LASSO_SHAPE words for each layer: filters, channels, taps, 0 or 1 (tap-major);
 *   dsp_cuda_lasso_table with words = null sets needed, then with words of that length writes them;
 *   the caller keeps the words and a copy of them in the device's memory.
 * element: of the weights, 0 float32, 1 float64, 2 float16, 3 bfloat16; everything else, sums, logs, rates,
 * scales, penalties and the work space, is float64 for float64 and float32 otherwise. No atomics: the result
 * depends on nothing but the arguments. */
#define DSP_CUDA_LASSO_SHAPE 4
#define DSP_CUDA_LASSO_ADDRESSES 4

DSP_API dsp_status dsp_cuda_lasso_table(int32_t element, int64_t groups, const int64_t* shapes,
                                        int64_t shapes_numel, int64_t* words, int64_t words_numel,
                                        int64_t* needed);

typedef struct dsp_cuda_lasso_layout {
  int64_t filters;     /* of all layers, N */
  int64_t workspace;   /* elements */
  int64_t tiles;       /* thread blocks of a pass over the weights */
  int64_t stage_bytes; /* of weights in a block's shared memory at a time, at most */
} dsp_cuda_lasso_layout;
/* directed is 1 where an operation is given directions of the weights. */
DSP_API dsp_status dsp_cuda_lasso_sizes(const int64_t* table, int64_t table_numel, int32_t operation,
                                        int32_t directed, dsp_cuda_lasso_layout* sizes);

typedef struct dsp_cuda_lasso_call {
  int32_t device;
  void* stream;         /* a cudaStream_t */
  const int64_t* table; /* on the host, as dsp_cuda_lasso_table wrote it */
  int64_t table_numel;
  const int64_t* device_table; /* the same words in the device's memory */
  /* For each layer: weight, direction, output, keep, as in dsp_lasso; 0 where there is none. On the host, and
   * the same in the device's memory. */
  const int64_t* addresses;
  int64_t addresses_numel;
  const int64_t* device_addresses;
  const void* logs; /* (G, N); rows of neighbouring elements, stride from row to row */
  int64_t log_stride, logs_numel;
  const void* rates; /* one a layer, of which rate x scale is dsp_lasso's amount; null for the penalty */
  const void* scales;
  int64_t numbers_numel;
  void* log_out; /* (G, N), where the operation has an output for the logs */
  int64_t log_out_stride, log_out_numel;
  void* penalties; /* one a layer: of the penalty, or of the backward where not null */
  void* workspace;
  int64_t workspace_numel;
} dsp_cuda_lasso_call;
DSP_API dsp_status dsp_cuda_lasso_run(int32_t operation, const dsp_cuda_lasso_call* call);

/* Samples of the groups: out = log softmax over the groups of first / temperature + second, or, where divide
 * is 1, of (first + second) / temperature, for logits and noise; and the gradient (first - p sum over the
 * groups of first) / temperature for a gradient and the log-probabilities log p. first, second: (groups,
 * count) with strides between their rows; out is contiguous. element: 0 float32, 1 float64. */
typedef struct dsp_cuda_samples {
  int32_t device;
  void* stream;
  int32_t element;
  int32_t divide;
  int64_t groups, count;
  double temperature;
  const void* first;
  int64_t first_stride;
  const void* second;
  int64_t second_stride;
  void* out;
} dsp_cuda_samples;
DSP_API dsp_status dsp_cuda_sample_groups(const dsp_cuda_samples* samples);
DSP_API dsp_status dsp_cuda_sample_groups_backward(const dsp_cuda_samples* samples);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* DSP_H_ */
