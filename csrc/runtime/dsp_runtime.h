/* Networks from program files, in C: load, ask, run. Nothing else of the package is needed, Python neither.
 *
 *   dsp_model* model;
 *   if (dsp_model_load("net.dsp", &model) != DSP_OK) puts(dsp_last_error());
 *   float in[3 * 32 * 32], out[10];
 *   dsp_tensor x = {in, DSP_FLOAT32, 4, {1, 3, 32, 32}}, y = {out, DSP_FLOAT32, 2, {1, 10}};
 *   if (dsp_model_run(model, &x, 1, &y, 1, 1) != DSP_OK) puts(dsp_last_error());
 *   dsp_model_destroy(model);
 *
 * A function that can fail returns a dsp_status; dsp_last_error() then gives the reason as text, per thread,
 * until the next failing call on that thread. No exception leaves the library. Any number of threads may use
 * one model at the same time; a model belongs to the process that loaded it, and is good in its forks.
 *
 * What is declared here stays as it is while DSP_RUNTIME_VERSION does; functions may be added. */
#ifndef DSP_RUNTIME_H_
#define DSP_RUNTIME_H_

#include <stdint.h>

#if defined(__GNUC__)
#define DSP_API __attribute__((visibility("default")))
#else
#define DSP_API
#endif

#ifdef __cplusplus
extern "C" {
#endif

#define DSP_RUNTIME_VERSION 1
#define DSP_FILE_VERSION 1 /* of program files: this one is written and read */

typedef enum dsp_status {
  DSP_OK = 0,
  DSP_INVALID_ARGUMENT = 1, /* also: a file that is damaged, or that this library cannot run */
  DSP_OUT_OF_MEMORY = 2,
  DSP_INTERNAL = 3,
  DSP_NO_DEVICE = 4,  /* no CUDA driver, no such device, or built without CUDA */
  DSP_CUDA_ERROR = 5, /* the CUDA runtime refused */
  DSP_IO_ERROR = 6    /* the file cannot be opened or read */
} dsp_status;

DSP_API const char* dsp_last_error(void);
/* DSP_RUNTIME_VERSION of the library that is loaded. */
DSP_API int32_t dsp_runtime_version(void);
/* "avx512", "avx2", "neon" or "generic": what the kernels run as on this machine. */
DSP_API const char* dsp_cpu_isa(void);

typedef enum dsp_dtype {
  DSP_FLOAT32 = 0,
  DSP_BFLOAT16 = 1, /* named, not yet taken by any program */
  DSP_INT8 = 2      /* the same */
} dsp_dtype;

#define DSP_MAX_RANK 4

/* A caller's array, contiguous, aligned as its elements are: (batch, channels, height, width), or
 * (batch, features) where rank is 2. */
typedef struct dsp_tensor {
  void* data; /* of an input it is only read */
  int32_t dtype;
  int32_t rank;
  int64_t shape[DSP_MAX_RANK];
} dsp_tensor;

typedef struct dsp_tensor_info {
  const char* name; /* printable ASCII without spaces; lives as long as the model */
  int32_t dtype;
  int32_t rank;
  int64_t shape[DSP_MAX_RANK]; /* of one image, as exported: shape[0] is 1 */
  /* What each size of an input may be (2^31: no bound); of an output, which follows from them, as shape. */
  int64_t least[DSP_MAX_RANK], most[DSP_MAX_RANK];
} dsp_tensor_info;

typedef struct dsp_model dsp_model;

/* Reads, checks and plans. The file is not read again unless other image sizes are asked for; where it allows
 * them it stays open. */
DSP_API dsp_status dsp_model_load(const char* path, dsp_model** model);
/* The same from memory, which must stay as it is until the model is destroyed. */
DSP_API dsp_status dsp_model_load_memory(const void* data, int64_t bytes, dsp_model** model);
/* No call may be under way. A null model is ignored. */
DSP_API void dsp_model_destroy(dsp_model* model);

/* How many there are; 0 for a null model. */
DSP_API int32_t dsp_model_inputs(const dsp_model* model);
DSP_API int32_t dsp_model_outputs(const dsp_model* model);
DSP_API dsp_status dsp_model_input(const dsp_model* model, int32_t index, dsp_tensor_info* info);
DSP_API dsp_status dsp_model_output(const dsp_model* model, int32_t index, dsp_tensor_info* info);

/* Sets dtype, rank and shape of the outputs for inputs of these shapes; data is not looked at. Plans for
 * sizes other than the file's, which dsp_model_run does, too, when it first meets them; the plans of the last
 * 8 sizes are kept. */
DSP_API dsp_status dsp_model_plan(dsp_model* model, const dsp_tensor* inputs, int32_t n_inputs,
                                  dsp_tensor* outputs, int32_t n_outputs);
/* Runs a batch of any size on at most `threads` threads, the caller's among them; neither that number nor the
 * rest of the batch changes a bit of the result. Outputs must not overlap inputs or one another; when it
 * fails, they hold what they held, unless memory ran out. */
DSP_API dsp_status dsp_model_run(dsp_model* model, const dsp_tensor* inputs, int32_t n_inputs,
                                 const dsp_tensor* outputs, int32_t n_outputs, int32_t threads);

typedef struct dsp_program_memory {
  int64_t weight_bytes;  /* prepared weights, biases and tables */
  int64_t arena_bytes;   /* activations of one image, and those of a second one from where two go together */
  int64_t scratch_bytes; /* per thread, at most */
  int64_t arenas;        /* how many arenas exist now: one per image or pair in work at the same time */
} dsp_program_memory;
/* Of the plan for the file's own sizes. */
DSP_API dsp_status dsp_model_memory_use(const dsp_model* model, dsp_program_memory* memory);

#ifdef __cplusplus
} /* extern "C" */
#endif

#endif /* DSP_RUNTIME_H_ */
