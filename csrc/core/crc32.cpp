#include "core/crc32.h"

#include <cstring>

namespace dsp {
namespace {

constexpr uint32_t kPolynomial = 0xedb88320;  // reflected
constexpr size_t kWidth = 8;

struct Tables {
  // of[k][b]: byte b and then k bytes of zero
  uint32_t of[kWidth][256];
  constexpr Tables() : of() {
    for (uint32_t byte = 0; byte < 256; ++byte) {
      uint32_t value = byte;
      for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ ((value & 1) != 0 ? kPolynomial : 0);
      of[0][byte] = value;
    }
    for (size_t k = 1; k < kWidth; ++k) {
      for (size_t byte = 0; byte < 256; ++byte)
        of[k][byte] = (of[k - 1][byte] >> 8) ^ of[0][of[k - 1][byte] & 0xff];
    }
  }
};
constexpr Tables kTables;

}  // namespace

uint32_t crc32(const void* data, size_t bytes) {
  const auto* at = static_cast<const uint8_t*>(data);
  uint32_t value = ~uint32_t{0};
  for (; bytes >= kWidth; at += kWidth, bytes -= kWidth) {
    uint64_t word = 0;
    std::memcpy(&word, at, sizeof(word));  // little-endian, as the files are
    word ^= value;
    value = 0;
    for (size_t k = 0; k < kWidth; ++k) value ^= kTables.of[kWidth - 1 - k][(word >> (8 * k)) & 0xff];
  }
  for (; bytes > 0; ++at, --bytes) value = (value >> 8) ^ kTables.of[0][(value ^ *at) & 0xff];
  return ~value;
}

}  // namespace dsp
