// CRC-32 of ISO 3309 (that of zlib, PNG and Ethernet), eight bytes at a time by tables.
#pragma once

#include <cstddef>
#include <cstdint>

namespace dsp {

uint32_t crc32(const void* data, size_t bytes);

}  // namespace dsp
