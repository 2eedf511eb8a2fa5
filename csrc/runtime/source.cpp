// The bytes of a program file: from a path, read as often as they are needed, or from the caller's memory.
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdlib>
#include <cstring>
#include <new>
#include <string>

#include "core/status.h"
#include "runtime/model.h"

namespace dsp {
namespace {

void release(uint8_t* bytes) { std::free(bytes); }
void keep(uint8_t*) {}

FileSource::Bytes allocated(int64_t numel) {
  auto* data = static_cast<uint8_t*>(std::malloc(static_cast<size_t>(numel)));
  if (data == nullptr) throw std::bad_alloc();
  return {data, numel, {data, &release}};
}

class Path final : public FileSource {
 public:
  explicit Path(const char* path) : name_(path), file_(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    if (file_ < 0) refuse(std::strerror(errno));
  }
  ~Path() override {
    if (file_ >= 0) close(file_);
  }
  // The size that the file states is held against the one that it has before memory is taken.
  Bytes read() override {
    struct stat about;
    if (fstat(file_, &about) != 0) refuse(std::strerror(errno));
    if (!S_ISREG(about.st_mode)) refuse("it is no regular file");
    uint8_t header[kFileHeader];
    const int64_t numel = static_cast<int64_t>(about.st_size);
    if (numel >= kFileHeader) read_to(header, kFileHeader);
    if (const int64_t stated = stated_bytes(header, numel); stated != numel)
      fail("program file: " + name_ + " has " + std::to_string(numel) + " bytes, not the " +
           std::to_string(stated) + " that it states");
    Bytes bytes = allocated(numel);
    read_to(bytes.owner.get(), numel);
    return bytes;
  }

 private:
  [[noreturn]] void refuse(const char* why) const {
    throw Error(DSP_IO_ERROR, "program file: " + name_ + ": " + why);
  }
  void read_to(uint8_t* to, int64_t numel) const {
    for (int64_t at = 0; at < numel;) {
      const ssize_t got = pread(file_, to + at, static_cast<size_t>(numel - at), static_cast<off_t>(at));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) refuse(std::strerror(errno));
      if (got == 0) refuse("it ended while it was read");
      at += got;
    }
  }

  std::string name_;
  int file_;
};

class Memory final : public FileSource {
 public:
  Memory(const void* data, int64_t numel) : data_(static_cast<const uint8_t*>(data)), numel_(numel) {}
  Bytes read() override {
    if (reinterpret_cast<uintptr_t>(data_) % kFileAlignment == 0) return {data_, numel_, {nullptr, &keep}};
    Bytes copy = allocated(numel_);
    std::memcpy(copy.owner.get(), data_, static_cast<size_t>(numel_));
    return copy;
  }

 private:
  const uint8_t* data_;
  int64_t numel_;
};

}  // namespace

std::unique_ptr<FileSource> file_source(const char* path) { return std::make_unique<Path>(path); }

std::unique_ptr<FileSource> memory_source(const void* data, int64_t numel) {
  static_cast<void>(stated_bytes(static_cast<const uint8_t*>(data), numel));
  return std::make_unique<Memory>(data, numel);
}

}  // namespace dsp
