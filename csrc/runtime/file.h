// Program files: what is in one, and how it lies there. Little-endian; all offsets from the start of the
// file.
//
//   0  8 bytes  89 44 53 50 0d 0a 1a 0a         8  u32  DSP_FILE_VERSION
//  12  u32      CRC-32 of all that follows      16  u64  bytes of the file
//  24  u32      number of sections              28  u32  0
//  32  for each section: u32 kind, u32 dtype, u64 offset, u64 bytes, u64 0
//
// then the sections, in the order of `SectionKind`, each at the next multiple of 64; between them are zeros.
//
// kTensors:    u32 inputs, u32 outputs, then each: u32 dtype, u32 rank, i64 shape[4], least[4], most[4]
// (unused
//              sizes are 0), u32 bytes of its name, the name, zeros up to a multiple of 8
// kOperations: for each operation that the steps use, and each activation that there was when the file was
//              written: u32 kind (0 a step, 1 an activation), u32 code, u64 hash of its name and fields. A
//              library in which one of them has changed refuses the file instead of reading it wrongly.
// kSteps:      i64 words, a description as dsp.h has it
// kWeights:    its floats; dtype says how they are stored
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

#include "runtime/dsp_runtime.h"

namespace dsp {

struct TensorInfo {
  std::string name;
  int32_t dtype = DSP_FLOAT32;
  int32_t rank = 0;
  int64_t shape[DSP_MAX_RANK] = {};
  int64_t least[DSP_MAX_RANK] = {};
  int64_t most[DSP_MAX_RANK] = {};
  bool fixed() const;  // whether it has one size, but for the batch
};

// The words and floats of a file lie in the file's bytes.
struct Contents {
  std::vector<TensorInfo> inputs, outputs;
  const int64_t* words = nullptr;
  int64_t words_numel = 0;
  const float* floats = nullptr;
  int64_t floats_numel = 0;
  uint32_t checksum = 0;
};

constexpr int64_t kFileHeader = 32;
constexpr int64_t kFileAlignment = 8;  // of the bytes that `read_contents` is given

// The size that a file states, from its first kFileHeader bytes or more. Throws Error for what is no program
// file of this version.
int64_t stated_bytes(const uint8_t* bytes, int64_t numel);

// Throws Error unless the bytes are a whole file, undamaged, with nothing beside what is said above.
Contents read_contents(const uint8_t* bytes, int64_t numel);

// How large its file is, and the file itself. Throws Error for names and shapes that no reader would take.
int64_t contents_bytes(const Contents& contents);
void write_contents(const Contents& contents, uint8_t* bytes);

}  // namespace dsp
