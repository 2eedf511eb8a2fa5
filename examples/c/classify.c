/* Runs a program file in C: classify NET.dsp IMAGES.f32 [OUT.f32]
 *
 * IMAGES.f32 holds float32 values, one image after the other, channels first, as numpy's x.tofile() writes
 * them. Prints the largest output of each image and its place; OUT.f32 gets all outputs.
 *
 *   cc classify.c $(python -m dsp_kernels.config --cflags --libs) -o classify */
#include <dsp_runtime.h>
#include <stdio.h>
#include <stdlib.h>

static float* read_floats(const char* path, size_t* count) {
  FILE* file = fopen(path, "rb");
  if (file == NULL || fseek(file, 0, SEEK_END) != 0) return NULL;
  const long bytes = ftell(file);
  rewind(file);
  float* values = bytes < 0 ? NULL : malloc((size_t)bytes + 1);
  if (values != NULL) *count = fread(values, sizeof(float), (size_t)bytes / sizeof(float), file);
  fclose(file);
  return values;
}

static int refuse(const char* what, const char* why) {
  fprintf(stderr, "classify: %s: %s\n", what, why);
  return 1;
}

static size_t image_size(const dsp_tensor_info* info) {
  size_t size = 1;
  for (int i = 1; i < info->rank; ++i) size *= (size_t)info->shape[i];
  return size;
}

static dsp_tensor of_batch(const dsp_tensor_info* info, float* data, size_t batch) {
  dsp_tensor tensor = {data, info->dtype, info->rank, {(int64_t)batch, 0, 0, 0}};
  for (int i = 1; i < info->rank; ++i) tensor.shape[i] = info->shape[i];
  return tensor;
}

int main(int count, char** arguments) {
  if (count < 3) return refuse("usage", "classify NET.dsp IMAGES.f32 [OUT.f32]");
  dsp_model* model = NULL;
  if (dsp_model_load(arguments[1], &model) != DSP_OK) return refuse(arguments[1], dsp_last_error());
  dsp_tensor_info in, out;
  if (dsp_model_inputs(model) != 1 || dsp_model_outputs(model) != 1)
    return refuse(arguments[1], "it has several inputs or outputs");
  dsp_model_input(model, 0, &in);
  dsp_model_output(model, 0, &out);

  size_t floats = 0;
  float* images = read_floats(arguments[2], &floats);
  if (images == NULL) return refuse(arguments[2], "cannot be read");
  const size_t batch = floats / image_size(&in), outputs = image_size(&out);
  if (batch * image_size(&in) != floats) return refuse(arguments[2], "part of an image");
  float* results = malloc(batch * outputs * sizeof(float) + 1);
  if (results == NULL) return refuse(arguments[2], "too large");

  const dsp_tensor x = of_batch(&in, images, batch), y = of_batch(&out, results, batch);
  if (dsp_model_run(model, &x, 1, &y, 1, 1) != DSP_OK) return refuse("run", dsp_last_error());
  for (size_t n = 0; n < batch; ++n) {
    const float* scores = results + n * outputs;
    size_t best = 0;
    for (size_t i = 1; i < outputs; ++i)
      if (scores[i] > scores[best]) best = i;
    printf("image %zu: %s %zu is %.6g\n", n, out.name, best, (double)scores[best]);
  }
  if (count > 3) {
    FILE* file = fopen(arguments[3], "wb");
    if (file == NULL || fwrite(results, sizeof(float), batch * outputs, file) != batch * outputs ||
        fclose(file) != 0)
      return refuse(arguments[3], "cannot be written");
  }
  free(results);
  free(images);
  dsp_model_destroy(model);
  return 0;
}
