#include "engine/loader/safetensors.h"

#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <unordered_set>
#include <utility>

#include "engine/loader/json.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;

constexpr std::int64_t kLengthBytes = 8;
constexpr std::int64_t kMaxHeaderBytes = 100'000'000;  // the limit of the reference implementation
constexpr std::size_t kMaxRank = 16;

// A header entry as written: offsets are relative to the data and not yet trusted.
struct Entry {
  std::string name;
  std::optional<DataType> dtype;
  std::optional<std::vector<std::int64_t>> shape;
  std::optional<std::vector<std::int64_t>> offsets;  // [2] begin, end
};

// Reads the header as a stream of events. A tree of it would hide duplicate keys and lets a hostile header of 100 MB
// ask for gigabytes; here memory is bounded by the entries that are valid so far. Each handler returns false to stop,
// with the reason in `status`.
class HeaderReader : public nlohmann::json_sax<Json> {
 public:
  explicit HeaderReader(std::string_view file_name) : file_name_(file_name) {}

  std::vector<Entry> entries;
  std::map<std::string, std::string, std::less<>> metadata;
  Status status;

  bool null() override { return unexpected("null"); }
  bool boolean(bool value) override { return unexpected(value ? "true" : "false"); }
  bool number_float(double, const std::string& text) override { return unexpected(quote(text)); }
  bool binary(Json::binary_t&) override { return unexpected("binary data"); }
  bool number_integer(std::int64_t value) override { return unexpected(std::to_string(value)); }  // negative only

  bool number_unsigned(std::uint64_t value) override {
    if (place_ != Place::kNumbers) return unexpected(std::to_string(value));
    if (value > static_cast<std::uint64_t>(std::numeric_limits<std::int64_t>::max())) {
      return unexpected(std::to_string(value));
    }
    if (numbers().size() == (reading_shape_ ? kMaxRank : 2)) {
      return fail(fmt::format("{} has more than {} elements", where(), numbers().size()));
    }
    numbers().push_back(static_cast<std::int64_t>(value));
    return true;
  }

  bool string(std::string& value) override {
    if (place_ == Place::kMetadata) {
      metadata[key_] = std::move(value);
      return true;
    }
    if (place_ != Place::kEntry || key_ != "dtype") return unexpected(quote(value));
    entries.back().dtype = data_type_from_name(value);
    if (!entries.back().dtype) {
      status = unsupported(fmt::format("{}: {} is {}; allowed: {}", file_name_, where(), quote(value),
                                       data_type_list(all_data_types())));
      return false;
    }
    return true;
  }

  bool key(std::string& name) override {
    if (!keys_.back().insert(name).second) return fail(fmt::format("key {} appears twice", quote(name)));
    key_ = std::move(name);
    if (place_ == Place::kEntry && key_ != "dtype" && key_ != "shape" && key_ != "data_offsets") {
      return fail(fmt::format("tensor {} has the key {}; allowed: dtype, shape, data_offsets",
                              quote(entries.back().name), quote(key_)));
    }
    return true;
  }

  bool start_object(std::size_t) override {
    switch (place_) {
      case Place::kOutside: place_ = Place::kTop; break;
      case Place::kTop:
        place_ = key_ == kMetadataKey ? Place::kMetadata : Place::kEntry;
        if (place_ == Place::kEntry) entries.push_back({.name = key_, .dtype = {}, .shape = {}, .offsets = {}});
        break;
      default: return unexpected("an object");
    }
    keys_.emplace_back();
    return true;
  }

  bool end_object() override {
    keys_.pop_back();
    if (place_ == Place::kEntry) {
      const Entry& entry = entries.back();
      const char* missing = !entry.dtype ? "dtype" : !entry.shape ? "shape" : !entry.offsets ? "data_offsets" : nullptr;
      if (missing) return fail(fmt::format("tensor {} has no {}", quote(entry.name), missing));
    }
    place_ = place_ == Place::kTop ? Place::kOutside : Place::kTop;
    return true;
  }

  bool start_array(std::size_t) override {
    if (place_ != Place::kEntry || key_ == "dtype") return unexpected("an array");
    place_ = Place::kNumbers;
    reading_shape_ = key_ == "shape";
    (reading_shape_ ? entries.back().shape : entries.back().offsets).emplace();
    return true;
  }

  bool end_array() override {
    place_ = Place::kEntry;
    if (!reading_shape_ && numbers().size() != 2) {
      return fail(fmt::format("{} has {} elements; allowed: 2", where(), numbers().size()));
    }
    return true;
  }

  bool parse_error(std::size_t position, const std::string&, const nlohmann::detail::exception&) override {
    return fail(fmt::format("the header is not valid JSON at byte {} of it", position));
  }

 private:
  static constexpr std::string_view kMetadataKey = "__metadata__";

  // Where the next event belongs: {"tensor": {"dtype": ..., "shape": [...]}, "__metadata__": {...}}.
  enum class Place { kOutside, kTop, kMetadata, kEntry, kNumbers };

  std::vector<std::int64_t>& numbers() { return reading_shape_ ? *entries.back().shape : *entries.back().offsets; }

  // What the current value is, for a message.
  std::string where() const {
    switch (place_) {
      case Place::kOutside: return "the header";
      case Place::kTop: return fmt::format("the entry of {}", quote(key_));
      case Place::kMetadata: return fmt::format("{} of __metadata__", quote(key_));
      default: return fmt::format("{} of tensor {}", key_, quote(entries.back().name));
    }
  }

  const char* allowed() const {
    switch (place_) {
      case Place::kOutside:
      case Place::kTop: return "an object";
      case Place::kMetadata: return "a string";
      case Place::kNumbers: return "integers from 0 to 2^63 - 1";
      case Place::kEntry: break;
    }
    return key_ == "dtype" ? "a string" : "an array of integers";
  }

  bool unexpected(std::string_view seen) {
    return fail(
        fmt::format("{} {} {}; allowed: {}", where(), place_ == Place::kNumbers ? "contains" : "is", seen, allowed()));
  }

  bool fail(std::string_view reason) {
    status = io_error(fmt::format("{}: {}", file_name_, reason));
    return false;
  }

  std::string_view file_name_;
  Place place_ = Place::kOutside;
  bool reading_shape_ = false;
  std::string key_;
  std::vector<std::unordered_set<std::string>> keys_;  // seen in each open object
};

std::uint64_t read_u64_le(std::span<const std::byte> bytes) {
  std::uint64_t value = 0;
  for (std::size_t i = 0; i < 8; ++i) value |= std::to_integer<std::uint64_t>(bytes[i]) << (8 * i);
  return value;
}

// product(shape) * item_bytes, or nothing if that does not fit.
std::optional<std::int64_t> tensor_bytes(const std::vector<std::int64_t>& shape, std::int64_t item_bytes) {
  // A zero makes the product zero wherever it stands, so the order of the factors must not decide about overflow.
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  std::int64_t total = item_bytes;
  for (std::int64_t extent : shape) {
    if (__builtin_mul_overflow(total, extent, &total)) return std::nullopt;
  }
  return total;
}

Status check_entry(const Entry& entry, std::int64_t data_bytes, std::string_view file_name) {
  const auto [begin, end] = std::pair((*entry.offsets)[0], (*entry.offsets)[1]);
  const auto fail = [&](const std::string& reason) {
    return io_error(fmt::format("{}: tensor {}: {}", file_name, quote(entry.name), reason));
  };
  if (begin > end) return fail(fmt::format("data_offsets [{}, {}] are not in order", begin, end));
  if (end > data_bytes) {
    return fail(
        fmt::format("data_offsets [{}, {}] end outside the data; expected {} bytes of data, seen {} (is the "
                    "file truncated?)",
                    begin, end, end, data_bytes));
  }
  const auto expected = tensor_bytes(*entry.shape, data_type_bytes(*entry.dtype));
  if (!expected) {
    return fail(fmt::format("shape [{}] of {} needs more than 2^63 - 1 bytes", fmt::join(*entry.shape, ", "),
                            data_type_name(*entry.dtype)));
  }
  if (*expected != end - begin) {
    return fail(fmt::format("shape [{}] of {} needs {} bytes; data_offsets [{}, {}] hold {}",
                            fmt::join(*entry.shape, ", "), data_type_name(*entry.dtype), *expected, begin, end,
                            end - begin));
  }
  return {};
}

// The format demands that the tensors tile the data: an overlap would alias weights, a gap would hide bytes.
Status check_tiling(const std::vector<Entry>& entries, std::int64_t data_bytes, std::string_view file_name) {
  std::vector<const Entry*> by_offset;
  by_offset.reserve(entries.size());
  for (const Entry& entry : entries) by_offset.push_back(&entry);
  std::sort(by_offset.begin(), by_offset.end(), [](const Entry* a, const Entry* b) {
    return std::tie(*a->offsets, a->name) < std::tie(*b->offsets, b->name);
  });
  std::int64_t covered = 0;
  for (const Entry* in_order : by_offset) {
    const Entry& entry = *in_order;
    const std::int64_t begin = (*entry.offsets)[0];
    if (begin != covered) {
      return io_error(fmt::format(
          "{}: tensor {} begins at byte {} of the data, which {} the end of the tensor before "
          "it at byte {}; allowed: no overlap and no gap",
          file_name, quote(entry.name), begin, begin < covered ? "overlaps" : "leaves a gap after", covered));
    }
    covered = (*entry.offsets)[1];
  }
  if (covered != data_bytes) {
    return io_error(
        fmt::format("{}: the tensors cover {} bytes of data; seen {}; allowed: no bytes after the last "
                    "tensor",
                    file_name, covered, data_bytes));
  }
  return {};
}

}  // namespace

Result<SafetensorsContents> SafetensorsFile::parse(std::span<const std::byte> file, std::string_view file_name) {
  const auto file_bytes = static_cast<std::int64_t>(file.size());
  if (file_bytes < kLengthBytes) {
    return io_error(fmt::format("{}: not a safetensors file: expected at least {} bytes, seen {}", file_name,
                                kLengthBytes, file_bytes));
  }
  const std::uint64_t written_length = read_u64_le(file);
  if (written_length > static_cast<std::uint64_t>(kMaxHeaderBytes)) {
    return io_error(fmt::format("{}: not a safetensors file: header of {} bytes; allowed: at most {}", file_name,
                                written_length, kMaxHeaderBytes));
  }
  const auto header_bytes = static_cast<std::int64_t>(written_length);
  if (header_bytes > file_bytes - kLengthBytes) {
    return io_error(fmt::format("{}: truncated inside the header: expected at least {} bytes, seen {}", file_name,
                                kLengthBytes + header_bytes, file_bytes));
  }

  const auto header = file.subspan(kLengthBytes, static_cast<std::size_t>(header_bytes));
  const auto data = file.subspan(static_cast<std::size_t>(kLengthBytes + header_bytes));
  const auto data_bytes = static_cast<std::int64_t>(data.size());

  const auto* text = reinterpret_cast<const char*>(header.data());
  HeaderReader reader(file_name);
  if (!Json::sax_parse(text, text + header.size(), &reader)) {
    if (!reader.status.ok()) return reader.status;
    return internal_error(fmt::format("{}: the header was refused without a reason", file_name));
  }

  for (const Entry& entry : reader.entries) CA_RETURN_IF_ERROR(check_entry(entry, data_bytes, file_name));
  CA_RETURN_IF_ERROR(check_tiling(reader.entries, data_bytes, file_name));

  SafetensorsContents contents;
  contents.metadata = std::move(reader.metadata);
  contents.tensors.reserve(reader.entries.size());
  for (Entry& entry : reader.entries) {
    const auto begin = static_cast<std::size_t>((*entry.offsets)[0]);
    const auto end = static_cast<std::size_t>((*entry.offsets)[1]);
    contents.tensors.push_back({.name = std::move(entry.name),
                                .dtype = *entry.dtype,
                                .shape = std::move(*entry.shape),
                                .bytes = data.subspan(begin, end - begin)});
  }
  std::sort(contents.tensors.begin(), contents.tensors.end(),
            [](const TensorInfo& a, const TensorInfo& b) { return a.name < b.name; });
  return contents;
}

Result<SafetensorsFile> SafetensorsFile::open(const std::filesystem::path& path) {
  CA_ASSIGN_OR_RETURN(MappedFile file, MappedFile::open(path));
  CA_ASSIGN_OR_RETURN(SafetensorsContents contents, parse(file.bytes(), file.path()));
  return SafetensorsFile(std::move(file), std::move(contents));
}

const TensorInfo* SafetensorsFile::find(std::string_view name) const {
  const auto at = std::lower_bound(contents_.tensors.begin(), contents_.tensors.end(), name,
                                   [](const TensorInfo& tensor, std::string_view key) { return tensor.name < key; });
  return at != contents_.tensors.end() && at->name == name ? &*at : nullptr;
}

}  // namespace compact::engine
