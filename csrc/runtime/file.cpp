#include "runtime/file.h"

#include <algorithm>
#include <cstring>
#include <set>
#include <utility>

#include "core/crc32.h"
#include "core/status.h"
#include "dsp.h"
#include "program/read.h"

#if !defined(__BYTE_ORDER__) || __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "program files are read and written on little-endian machines"
#endif

namespace dsp {
namespace {

constexpr uint8_t kMagic[8] = {0x89, 'D', 'S', 'P', '\r', '\n', 0x1a, '\n'};
constexpr int64_t kSectionAlignment = 64;
constexpr uint32_t kMostTensors = 4096;
constexpr uint32_t kMostName = 255;

enum SectionKind : uint32_t { kTensors = 1, kOperations = 2, kSteps = 3, kWeights = 4 };
constexpr uint32_t kSections = 4;

struct Header {
  uint8_t magic[8];
  uint32_t version, checksum;
  uint64_t bytes;
  uint32_t sections, zero;
};
struct Section {
  uint32_t kind, dtype;
  uint64_t offset, bytes, zero;
};
struct Operation {
  uint32_t kind, code;
  uint64_t hash;
  bool operator<(const Operation& other) const {
    return std::make_pair(kind, code) < std::make_pair(other.kind, other.code);
  }
};
static_assert(sizeof(Header) == kFileHeader && sizeof(Section) == 32 && sizeof(Operation) == 16);
constexpr int64_t kFirstSection = kFileHeader + kSections * sizeof(Section);
constexpr size_t kCheckedFrom = offsetof(Header, bytes);

int64_t aligned(int64_t at, int64_t alignment) { return (at + alignment - 1) / alignment * alignment; }

// ---- operations ----

// FNV-1a.
class Hash {
 public:
  void add(const char* text) {
    do {
      value_ = (value_ ^ static_cast<uint8_t>(*text)) * 0x100000001b3u;
    } while (*text++ != '\0');
  }
  void add(int32_t number) { add(std::to_string(number).c_str()); }
  uint64_t value() const { return value_; }

 private:
  uint64_t value_ = 0xcbf29ce484222325u;
};

Operation operation_of(const dsp_step_info& step) {
  Hash hash;
  hash.add(step.name);
  for (int32_t i = 0; i < step.fields_numel; ++i) {
    hash.add(step.fields[i].name);
    hash.add(step.fields[i].kind);
  }
  return {0, static_cast<uint32_t>(step.code), hash.value()};
}

Operation operation_of(const dsp_activation_info& activation) {
  Hash hash;
  hash.add(activation.name);
  hash.add(activation.parameters);
  return {1, static_cast<uint32_t>(activation.code), hash.value()};
}

const dsp_step_info* find_step(uint32_t code) {
  for (int32_t i = 0; i < dsp_step_count(); ++i) {
    if (static_cast<uint32_t>(dsp_step_at(i)->code) == code) return dsp_step_at(i);
  }
  return nullptr;
}

const dsp_activation_info* find_activation(uint32_t code) {
  for (int32_t i = 0; i < dsp_activation_count(); ++i) {
    if (static_cast<uint32_t>(dsp_activation_at(i)->code) == code) return dsp_activation_at(i);
  }
  return nullptr;
}

// The codes of a description's steps. The lengths of all of them are looked at, the fields are not.
std::set<uint32_t> codes_of(const int64_t* words, int64_t numel) {
  std::set<uint32_t> codes;
  int64_t at = description_steps(words, numel);
  while (at < numel) {
    if (numel - at < 2 || words[at + 1] < 2 || words[at + 1] > numel - at)
      fail("program file: a step has a wrong length");
    if (words[at] < 0 || words[at] > 0x7fffffff || find_step(static_cast<uint32_t>(words[at])) == nullptr)
      fail("program file: the operation " + std::to_string(words[at]) + " is unknown to this library");
    codes.insert(static_cast<uint32_t>(words[at]));
    at += words[at + 1];
  }
  return codes;
}

std::vector<Operation> operations_of(const Contents& contents) {
  std::vector<Operation> operations;
  for (const uint32_t code : codes_of(contents.words, contents.words_numel))
    operations.push_back(operation_of(*find_step(code)));
  for (int32_t i = 0; i < dsp_activation_count(); ++i)
    operations.push_back(operation_of(*dsp_activation_at(i)));
  std::sort(operations.begin(), operations.end());
  return operations;
}

void check_operations(const uint8_t* bytes, int64_t numel, const Contents& contents) {
  require(numel % static_cast<int64_t>(sizeof(Operation)) == 0, "program file: part of an operation");
  std::set<uint32_t> left = codes_of(contents.words, contents.words_numel);
  for (int64_t at = 0; at < numel; at += static_cast<int64_t>(sizeof(Operation))) {
    Operation given;
    std::memcpy(&given, bytes + at, sizeof(given));
    require(given.kind <= 1, "program file: an operation of an unknown kind");
    const char* name = nullptr;
    uint64_t hash = 0;
    if (given.kind == 0) {
      const dsp_step_info* step = find_step(given.code);
      if (step != nullptr) {
        name = step->name;
        hash = operation_of(*step).hash;
      }
      left.erase(given.code);
    } else if (const dsp_activation_info* activation = find_activation(given.code)) {
      name = activation->name;
      hash = operation_of(*activation).hash;
    }
    const std::string what = given.kind == 0 ? "step" : "activation";
    if (name == nullptr)
      fail("program file: the " + what + " " + std::to_string(given.code) +
           " is unknown to this library: " + "the file was written by a newer one");
    if (hash != given.hash)
      fail("program file: the " + what + " " + name +
           " is not the one that the file was written for: " + "export the network again with this version");
  }
  require(left.empty(), "program file: a step's operation is not among its operations");
}

// ---- inputs and outputs ----

// Reads from bytes, and not beyond them.
class Bytes {
 public:
  Bytes(const uint8_t* bytes, int64_t numel) : bytes_(bytes), numel_(numel) {}
  template <typename T>
  T next() {
    T value;
    std::memcpy(&value, take(static_cast<int64_t>(sizeof(T))), sizeof(T));
    return value;
  }
  const uint8_t* take(int64_t count) {
    if (count > numel_ - at_) fail("program file: the list of inputs and outputs ends too soon");
    at_ += count;
    return bytes_ + at_ - count;
  }
  void skip_zeros() {
    const int64_t count = aligned(at_, 8) - at_;
    const uint8_t* zeros = take(count);
    require(std::all_of(zeros, zeros + count, [](uint8_t byte) { return byte == 0; }),
            "program file: something lies between names");
  }
  bool at_end() const { return at_ == numel_; }

 private:
  const uint8_t* bytes_;
  int64_t numel_;
  int64_t at_ = 0;
};

void check_info(const TensorInfo& info, bool input) {
  const auto printable = [](char c) { return c > ' ' && c <= '~'; };
  if (info.name.empty() || info.name.size() > kMostName ||
      !std::all_of(info.name.begin(), info.name.end(), printable))
    fail("program file: an input or output has a name other than of 1 to " + std::to_string(kMostName) +
         " printable ASCII characters without spaces");
  const std::string what = "program file: " + info.name;
  if (info.dtype != DSP_FLOAT32)
    fail(what + " has the dtype " + std::to_string(info.dtype) + ", this library takes float32 (0)");
  if (info.rank != 2 && info.rank != 4)
    fail(what + " has " + std::to_string(info.rank) + " dimensions, expected 2 or 4");
  for (int i = 0; i < DSP_MAX_RANK; ++i) {
    const int64_t size = info.shape[i], least = info.least[i], most = info.most[i];
    if (i >= info.rank) {
      if (size != 0 || least != 0 || most != 0) fail(what + " has sizes beyond its dimensions");
      continue;
    }
    if (size < 1 || least < 0 || least > size || most < size) fail(what + " has sizes out of order");
    if ((i == 1 || !input) && i > 0 && (least != size || most != size))
      fail(what + " leaves a size open that is not");
  }
  if (info.shape[0] != 1) fail(what + " is not of one image");
}

void check_infos(const Contents& contents) {
  std::set<std::string> names;
  for (const bool input : {true, false}) {
    const std::vector<TensorInfo>& infos = input ? contents.inputs : contents.outputs;
    require(!infos.empty() && infos.size() <= kMostTensors,
            "program file: no inputs or outputs, or too many");
    for (const TensorInfo& info : infos) {
      check_info(info, input);
      if (!names.insert(info.name).second) fail("program file: two inputs or outputs are named " + info.name);
    }
  }
}

TensorInfo read_info(Bytes& bytes) {
  TensorInfo info;
  info.dtype = bytes.next<int32_t>();
  info.rank = bytes.next<int32_t>();
  for (int64_t* sizes : {info.shape, info.least, info.most}) {
    for (int i = 0; i < DSP_MAX_RANK; ++i) sizes[i] = bytes.next<int64_t>();
  }
  const uint32_t length = bytes.next<uint32_t>();
  require(length <= kMostName, "program file: the name of an input or output is too long");
  const uint8_t* name = bytes.take(length);
  info.name.assign(name, name + length);
  bytes.skip_zeros();
  return info;
}

void read_infos(const uint8_t* section, int64_t numel, Contents* contents) {
  Bytes bytes(section, numel);
  const uint32_t inputs = bytes.next<uint32_t>();
  const uint32_t outputs = bytes.next<uint32_t>();
  require(inputs <= kMostTensors && outputs <= kMostTensors, "program file: too many inputs or outputs");
  for (uint32_t i = 0; i < inputs; ++i) contents->inputs.push_back(read_info(bytes));
  for (uint32_t i = 0; i < outputs; ++i) contents->outputs.push_back(read_info(bytes));
  require(bytes.at_end(), "program file: something lies behind the list of inputs and outputs");
  check_infos(*contents);
}

std::vector<uint8_t> written_infos(const Contents& contents) {
  std::vector<uint8_t> bytes;
  const auto put = [&](const void* from, size_t count) {
    const auto* at = static_cast<const uint8_t*>(from);
    bytes.insert(bytes.end(), at, at + count);
  };
  for (const size_t count : {contents.inputs.size(), contents.outputs.size()}) {
    const uint32_t stored = static_cast<uint32_t>(count);
    put(&stored, sizeof(stored));
  }
  for (const auto* infos : {&contents.inputs, &contents.outputs}) {
    for (const TensorInfo& info : *infos) {
      put(&info.dtype, sizeof(info.dtype));
      put(&info.rank, sizeof(info.rank));
      for (const auto* sizes : {info.shape, info.least, info.most})
        put(sizes, DSP_MAX_RANK * sizeof(int64_t));
      const uint32_t length = static_cast<uint32_t>(info.name.size());
      put(&length, sizeof(length));
      put(info.name.data(), length);
      bytes.resize(static_cast<size_t>(aligned(static_cast<int64_t>(bytes.size()), 8)), 0);
    }
  }
  return bytes;
}

}  // namespace

bool TensorInfo::fixed() const {
  for (int i = 1; i < rank; ++i) {
    if (least[i] != most[i]) return false;
  }
  return true;
}

int64_t stated_bytes(const uint8_t* bytes, int64_t numel) {
  require(numel >= kFileHeader, "program file: it is too short to be one");
  Header header;
  std::memcpy(&header, bytes, sizeof(header));
  require(std::memcmp(header.magic, kMagic, sizeof(kMagic)) == 0, "program file: it does not start as one");
  if (header.version != DSP_FILE_VERSION)
    fail("program file: it has version " + std::to_string(header.version) + ", this library reads " +
         std::to_string(DSP_FILE_VERSION));
  require(header.bytes <= static_cast<uint64_t>(INT64_MAX), "program file: it states no size");
  return static_cast<int64_t>(header.bytes);
}

Contents read_contents(const uint8_t* bytes, int64_t numel) {
  const int64_t stated = stated_bytes(bytes, numel);
  if (stated != numel)
    fail("program file: it has " + std::to_string(numel) + " bytes, not the " + std::to_string(stated) +
         " that it states");
  Header header;
  std::memcpy(&header, bytes, sizeof(header));
  require(crc32(bytes + kCheckedFrom, static_cast<size_t>(numel) - kCheckedFrom) == header.checksum,
          "program file: it is damaged, its checksum is another");
  require(header.sections == kSections && header.zero == 0 && numel >= kFirstSection,
          "program file: it has other sections than expected");
  Section sections[kSections];
  std::memcpy(sections, bytes + kFileHeader, sizeof(sections));
  int64_t end = kFirstSection;
  for (uint32_t i = 0; i < kSections; ++i) {
    const Section& section = sections[i];
    require(section.kind == i + 1 && section.zero == 0, "program file: it has other sections than expected");
    const int64_t begin = aligned(end, kSectionAlignment);
    if (section.offset != static_cast<uint64_t>(begin) || begin > numel ||
        section.bytes > static_cast<uint64_t>(numel - begin))
      fail("program file: a section lies elsewhere, or reaches beyond the file");
    require(std::all_of(bytes + end, bytes + begin, [](uint8_t byte) { return byte == 0; }),
            "program file: something lies between sections");
    end = begin + static_cast<int64_t>(section.bytes);
    if (section.dtype != DSP_FLOAT32)
      fail("program file: its weights have the dtype " + std::to_string(section.dtype) +
           ", this library takes float32 (0)");
  }
  require(end == numel, "program file: something lies behind its sections");
  const auto at = [&](SectionKind kind) { return bytes + sections[kind - 1].offset; };
  const auto size = [&](SectionKind kind) { return static_cast<int64_t>(sections[kind - 1].bytes); };
  require(size(kSteps) % 8 == 0 && size(kWeights) % 4 == 0, "program file: part of a word or of a weight");
  Contents contents;
  contents.checksum = header.checksum;
  read_infos(at(kTensors), size(kTensors), &contents);
  contents.words = reinterpret_cast<const int64_t*>(at(kSteps));
  contents.words_numel = size(kSteps) / 8;
  contents.floats = reinterpret_cast<const float*>(at(kWeights));
  contents.floats_numel = size(kWeights) / 4;
  check_operations(at(kOperations), size(kOperations), contents);
  return contents;
}

namespace {

struct Parts {
  std::vector<uint8_t> infos;
  std::vector<Operation> operations;
  const void* data[kSections];
  int64_t bytes[kSections];
};

Parts parts_of(const Contents& contents) {
  check_infos(contents);
  Parts parts{written_infos(contents), operations_of(contents), {}, {}};
  const auto set = [&](SectionKind kind, const void* data, int64_t bytes) {
    parts.data[kind - 1] = data;
    parts.bytes[kind - 1] = bytes;
  };
  set(kTensors, parts.infos.data(), static_cast<int64_t>(parts.infos.size()));
  set(kOperations, parts.operations.data(),
      static_cast<int64_t>(parts.operations.size() * sizeof(Operation)));
  set(kSteps, contents.words, checked_mul(contents.words_numel, 8, "the steps"));
  set(kWeights, contents.floats, checked_mul(contents.floats_numel, 4, "the weights"));
  return parts;
}

int64_t bytes_of(const Parts& parts) {
  int64_t end = kFirstSection;
  for (const int64_t bytes : parts.bytes)
    end = checked_add(aligned(end, kSectionAlignment), bytes, "the program file");
  return end;
}

}  // namespace

int64_t contents_bytes(const Contents& contents) { return bytes_of(parts_of(contents)); }

void write_contents(const Contents& contents, uint8_t* bytes) {
  const Parts parts = parts_of(contents);
  const int64_t numel = bytes_of(parts);
  Header header{{}, DSP_FILE_VERSION, 0, static_cast<uint64_t>(numel), kSections, 0};
  std::memcpy(header.magic, kMagic, sizeof(kMagic));
  Section sections[kSections];
  int64_t end = kFirstSection;
  for (uint32_t i = 0; i < kSections; ++i) {
    const int64_t begin = aligned(end, kSectionAlignment);
    std::memset(bytes + end, 0, static_cast<size_t>(begin - end));
    if (parts.bytes[i] > 0) std::memcpy(bytes + begin, parts.data[i], static_cast<size_t>(parts.bytes[i]));
    sections[i] = {i + 1, DSP_FLOAT32, static_cast<uint64_t>(begin), static_cast<uint64_t>(parts.bytes[i]),
                   0};
    end = begin + parts.bytes[i];
  }
  std::memcpy(bytes, &header, sizeof(header));
  std::memcpy(bytes + kFileHeader, sections, sizeof(sections));
  header.checksum = crc32(bytes + kCheckedFrom, static_cast<size_t>(numel) - kCheckedFrom);
  std::memcpy(bytes, &header, sizeof(header));
}

}  // namespace dsp

extern "C" {

dsp_status dsp_program_file(const int64_t* words, int64_t words_numel, const float* floats,
                            int64_t floats_numel, const dsp_tensor_info* tensors, int32_t inputs,
                            int32_t outputs, uint8_t* file, int64_t bytes, int64_t* needed) {
  return dsp::guard([&] {
    using namespace dsp;
    require(words != nullptr && tensors != nullptr && needed != nullptr, "words, tensors or needed is null");
    require(floats_numel >= 0 && (floats != nullptr || floats_numel == 0), "floats is null");
    require(inputs >= 0 && outputs >= 0, "inputs or outputs is negative");
    Contents contents;
    contents.words = words;
    contents.words_numel = words_numel;
    contents.floats = floats;
    contents.floats_numel = floats_numel;
    for (int64_t i = 0; i < int64_t{inputs} + outputs; ++i) {
      const dsp_tensor_info& from = tensors[i];
      require(from.name != nullptr, "a name is null");
      TensorInfo info;
      info.name = from.name;
      info.dtype = from.dtype;
      info.rank = from.rank;
      std::copy(from.shape, from.shape + DSP_MAX_RANK, info.shape);
      std::copy(from.least, from.least + DSP_MAX_RANK, info.least);
      std::copy(from.most, from.most + DSP_MAX_RANK, info.most);
      (i < inputs ? contents.inputs : contents.outputs).push_back(std::move(info));
    }
    *needed = contents_bytes(contents);
    if (file == nullptr) return;
    if (bytes != *needed) fail("bytes is " + std::to_string(bytes) + ", expected " + std::to_string(*needed));
    write_contents(contents, file);
  });
}

}  // extern "C"
