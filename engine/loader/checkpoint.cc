#include "engine/loader/checkpoint.h"

#include <fmt/format.h>

#include <algorithm>
#include <set>
#include <system_error>
#include <utility>

#include "engine/loader/json.h"
#include "engine/loader/mapped_file.h"

namespace compact::engine {
namespace {

constexpr const char* kSingleFile = "model.safetensors";
constexpr const char* kIndexFile = "model.safetensors.index.json";

// Names come from a downloaded file: only one that stays in the model directory on every system is used.
bool is_plain_shard_name(std::string_view name) {
  return name.find_first_of(std::string_view("/\\:\0", 4)) == std::string_view::npos && !name.starts_with('.') &&
         name.ends_with(".safetensors");
}

bool is_present(const std::filesystem::path& path) {
  std::error_code ignored;
  // A dangling link counts as there: opening it then names the file, instead of "no checkpoint here".
  return std::filesystem::exists(path, ignored) || std::filesystem::is_symlink(path, ignored);
}

}  // namespace

Result<ShardMap> parse_shard_index(std::string_view json, std::string_view file_name) {
  CA_ASSIGN_OR_RETURN(const nlohmann::json index, parse_json_object(json, file_name));
  const auto weight_map = index.find("weight_map");
  if (weight_map == index.end()) return io_error(fmt::format("{}: weight_map is missing", file_name));
  if (!weight_map->is_object()) {
    return io_error(fmt::format("{}: weight_map is {}; allowed: an object from tensor name to shard file", file_name,
                                shown(*weight_map)));
  }
  ShardMap shard_of;
  for (const auto& [tensor, shard] : weight_map->items()) {
    if (!shard.is_string() || !is_plain_shard_name(shard.get_ref<const std::string&>())) {
      return io_error(
          fmt::format("{}: the shard of tensor {} is {}; allowed: a plain file name that ends in "
                      ".safetensors",
                      file_name, quote(tensor), shown(shard)));
    }
    shard_of.emplace(tensor, shard.get_ref<const std::string&>());
  }
  if (shard_of.empty()) return io_error(fmt::format("{}: weight_map names no tensor", file_name));
  return shard_of;
}

Result<Checkpoint> Checkpoint::open(const std::filesystem::path& directory) {
  Checkpoint checkpoint;
  checkpoint.directory_ = directory.string();

  if (is_present(directory / kSingleFile)) {
    CA_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::open(directory / kSingleFile));
    CA_RETURN_IF_ERROR(checkpoint.add(std::move(file)));
    return checkpoint;
  }
  if (!is_present(directory / kIndexFile)) {
    std::error_code ignored;
    if (!std::filesystem::is_directory(directory, ignored)) {
      return io_error(fmt::format("{}: not a directory; expected a model directory", checkpoint.directory_));
    }
    return io_error(
        fmt::format("{}: no checkpoint here; expected {} or {}", checkpoint.directory_, kSingleFile, kIndexFile));
  }

  CA_ASSIGN_OR_RETURN(const MappedFile index, MappedFile::open(directory / kIndexFile));
  const std::string_view text(reinterpret_cast<const char*>(index.bytes().data()), index.bytes().size());
  CA_ASSIGN_OR_RETURN(const ShardMap shard_of, parse_shard_index(text, index.path()));

  std::set<std::string> shards;
  for (const auto& [tensor, shard] : shard_of) shards.insert(shard);
  for (const std::string& shard : shards) {
    if (!is_present(directory / shard)) {
      return io_error(fmt::format("{}: shard {} is missing; {} names {} shards", checkpoint.directory_, shard,
                                  kIndexFile, shards.size()));
    }
    CA_ASSIGN_OR_RETURN(SafetensorsFile file, SafetensorsFile::open(directory / shard));
    CA_RETURN_IF_ERROR(checkpoint.add(std::move(file)));
  }

  for (const auto& [tensor, shard] : shard_of) {
    const std::string promised = (directory / shard).string();
    const auto found = checkpoint.tensors_.find(tensor);
    if (found == checkpoint.tensors_.end()) {
      return io_error(fmt::format("{}: tensor {} is missing; {} places it there", promised, quote(tensor), kIndexFile));
    }
    const std::string& actual = checkpoint.files_[found->second.file_idx].path();
    if (actual != promised) {
      return io_error(fmt::format("{}: tensor {} is missing; {} places it there, but it is in {}", promised,
                                  quote(tensor), kIndexFile, actual));
    }
  }
  return checkpoint;
}

Status Checkpoint::add(SafetensorsFile file) {
  const std::size_t file_idx = files_.size();
  for (std::size_t tensor_idx = 0; tensor_idx < file.tensors().size(); ++tensor_idx) {
    const TensorInfo& info = file.tensors()[tensor_idx];
    const auto [existing, inserted] = tensors_.emplace(info.name, Location{file_idx, tensor_idx});
    if (!inserted) {
      return io_error(fmt::format("tensor {} is in two shards: {} and {}", quote(info.name),
                                  files_[existing->second.file_idx].path(), file.path()));
    }
    weight_bytes_ += static_cast<std::int64_t>(info.bytes.size());
  }
  files_.push_back(std::move(file));
  return {};
}

Result<TensorRef> Checkpoint::tensor(std::string_view name, const std::vector<std::int64_t>& expected_shape,
                                     const std::vector<DataType>& allowed) const {
  const auto found = tensors_.find(name);
  if (found == tensors_.end()) {
    return io_error(fmt::format("{}: tensor {} is missing; expected shape [{}]", directory_, quote(name),
                                fmt::join(expected_shape, ", ")));
  }
  const SafetensorsFile& file = files_[found->second.file_idx];
  const TensorInfo& info = file.tensors()[found->second.tensor_idx];
  if (info.shape != expected_shape) {
    return io_error(fmt::format("{}: tensor {} has shape [{}]; expected [{}]", file.path(), quote(name),
                                fmt::join(info.shape, ", "), fmt::join(expected_shape, ", ")));
  }
  if (std::find(allowed.begin(), allowed.end(), info.dtype) == allowed.end()) {
    return unsupported(fmt::format("{}: tensor {} has type {}; expected one of {}", file.path(), quote(name),
                                   data_type_name(info.dtype), data_type_list(allowed)));
  }
  return TensorRef{.name = info.name, .dtype = info.dtype, .shape = info.shape, .bytes = info.bytes};
}

std::vector<std::string_view> Checkpoint::tensor_names() const {
  std::vector<std::string_view> names;
  names.reserve(tensors_.size());
  for (const auto& [name, location] : tensors_) names.push_back(name);
  return names;
}

}  // namespace compact::engine
