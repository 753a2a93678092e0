#include "engine/loader/checkpoint.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <filesystem>
#include <string>
#include <utility>

#include "tests/unit/safetensors_bytes.h"
#include "tests/unit/temp_dir.h"

namespace compact::engine {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using testing::safetensors_bytes;
using testing::TempDir;

constexpr const char* kIndex = "model.safetensors.index.json";
constexpr const char* kShard1 = "model-00001-of-00002.safetensors";
constexpr const char* kShard2 = "model-00002-of-00002.safetensors";

// A shard with one tensor of F32 [2].
std::string shard_with(const std::string& tensor) {
  return safetensors_bytes("{\"" + tensor + R"(":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}})", 8);
}

std::string index_of(const std::string& weight_map) {
  return R"({"metadata":{"total_size":16},"weight_map":)" + weight_map + "}";
}

// "a" in the first shard, "b" in the second.
void write_two_shards(const TempDir& dir) {
  dir.write(kShard1, shard_with("a"));
  dir.write(kShard2, shard_with("b"));
  dir.write(kIndex, index_of(R"({"a":"model-00001-of-00002.safetensors","b":"model-00002-of-00002.safetensors"})"));
}

std::string open_error(const TempDir& dir) {
  const auto checkpoint = Checkpoint::open(dir.path());
  EXPECT_FALSE(checkpoint.ok());
  EXPECT_EQ(checkpoint.status().code(), StatusCode::kIoError);
  return checkpoint.status().message();
}

TEST(Checkpoint, OpensASingleFile) {
  const TempDir dir;
  dir.write("model.safetensors", shard_with("a"));
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();
  const auto a = checkpoint->tensor("a", {2});
  ASSERT_TRUE(a.ok()) << a.status().message();
  EXPECT_EQ(a->name, "a");
  EXPECT_EQ(a->dtype, DataType::kF32);
  EXPECT_THAT(a->shape, ElementsAre(2));
  EXPECT_EQ(a->bytes[7], std::byte{7});
  EXPECT_EQ(checkpoint->weight_bytes(), 8);
}

TEST(Checkpoint, OpensShardsAndSurvivesAMove) {
  const TempDir dir;
  write_two_shards(dir);
  auto opened = Checkpoint::open(dir.path());
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  const auto before = opened->tensor("b", {2});
  ASSERT_TRUE(before.ok());
  const Checkpoint checkpoint = std::move(opened).value();
  EXPECT_EQ(before->name, "b");
  EXPECT_EQ(before->bytes[3], std::byte{3});
  EXPECT_TRUE(checkpoint.contains("a"));
  EXPECT_FALSE(checkpoint.contains("c"));
  EXPECT_THAT(checkpoint.tensor_names(), ElementsAre("a", "b"));
  EXPECT_EQ(checkpoint.weight_bytes(), 16);
}

// Downloads by huggingface_hub are links into a store of blobs.
TEST(Checkpoint, FollowsLinks) {
  const TempDir blobs;
  const TempDir dir;
  std::filesystem::create_symlink(blobs.write("blob", shard_with("a")), dir.path() / "model.safetensors");
  EXPECT_TRUE(Checkpoint::open(dir.path()).ok());
  std::filesystem::remove(blobs.path() / "blob");
  EXPECT_THAT(open_error(dir), AllOf(HasSubstr("model.safetensors"), HasSubstr("No such file")));
}

TEST(Checkpoint, NamesWhatADirectoryLacks) {
  const TempDir dir;
  EXPECT_THAT(open_error(dir), AllOf(HasSubstr("no checkpoint"), HasSubstr("model.safetensors"), HasSubstr(kIndex)));
  const auto absent = Checkpoint::open(dir.path() / "nowhere");
  ASSERT_FALSE(absent.ok());
  EXPECT_THAT(absent.status().message(), AllOf(HasSubstr("nowhere"), HasSubstr("not a directory")));
}

TEST(Checkpoint, NamesAMissingShard) {
  const TempDir dir;
  write_two_shards(dir);
  std::filesystem::remove(dir.path() / kShard2);
  EXPECT_THAT(open_error(dir), AllOf(HasSubstr("model-00002-of-00002.safetensors is missing"), HasSubstr("2 shards")));
}

TEST(Checkpoint, NamesATruncatedShard) {
  const TempDir dir;
  write_two_shards(dir);
  const std::string whole = shard_with("b");
  dir.write(kShard2, whole.substr(0, whole.size() - 3));
  EXPECT_THAT(open_error(dir), AllOf(HasSubstr(kShard2), HasSubstr("expected 8 bytes of data, seen 5")));
  dir.write(kShard2, "");
  EXPECT_THAT(open_error(dir), AllOf(HasSubstr(kShard2), HasSubstr("seen 0")));
}

TEST(Checkpoint, NamesATensorThatItsShardLacks) {
  const TempDir dir;
  write_two_shards(dir);
  dir.write(kShard2, shard_with("c"));
  EXPECT_THAT(open_error(dir), AllOf(HasSubstr(kShard2), HasSubstr("tensor \"b\" is missing")));
}

TEST(Checkpoint, RefusesATensorOutsideThePromisedShard) {
  const TempDir dir;
  write_two_shards(dir);
  dir.write(kIndex, index_of(R"({"a":"model-00002-of-00002.safetensors","b":"model-00001-of-00002.safetensors"})"));
  EXPECT_THAT(open_error(dir), AllOf(HasSubstr("\"a\" is missing"), HasSubstr("but it is in"), HasSubstr(kShard1)));
}

TEST(Checkpoint, RefusesATensorInTwoShards) {
  const TempDir dir;
  write_two_shards(dir);
  dir.write(kShard2, safetensors_bytes(R"({"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},)"
                                       R"("b":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}})",
                                       8));
  EXPECT_THAT(open_error(dir), AllOf(HasSubstr("\"a\" is in two shards"), HasSubstr(kShard1), HasSubstr(kShard2)));
}

TEST(Checkpoint, RefusesShardNamesThatLeaveTheDirectory) {
  // With a real file at each target, so that only the name can be the reason.
  const TempDir dir;
  std::filesystem::create_directory(dir.path() / "model");
  dir.write("outside.safetensors", shard_with("a"));
  dir.write("model/inside.safetensors", shard_with("a"));
  for (const std::string name :
       {"../outside.safetensors", "sub/x.safetensors", "/etc/x.safetensors", "..\\\\x.safetensors", "..", ".", "",
        "c:x.safetensors", ".hidden.safetensors", "inside.bin", "a\\u0000.safetensors"}) {
    dir.write(std::string("model/") + kIndex, index_of("{\"a\":\"" + name + "\"}"));
    const auto checkpoint = Checkpoint::open(dir.path() / "model");
    ASSERT_FALSE(checkpoint.ok()) << name;
    EXPECT_THAT(checkpoint.status().message(), AllOf(HasSubstr("shard of tensor \"a\""), HasSubstr("plain file name")))
        << name;
  }
}

TEST(Checkpoint, RefusesMalformedIndexes) {
  const std::pair<std::string, std::string> cases[] = {
      {"", "not valid JSON"},
      {"{", "line 1, column 2"},
      {"[]", "the top level is an array"},
      {"{}", "weight_map is missing"},
      {R"({"weight_map":[]})", "weight_map is an array"},
      {R"({"weight_map":{}})", "names no tensor"},
      {R"({"weight_map":{"a":3}})", "shard of tensor \"a\" is 3"},
      {R"({"weight_map":{"a":"x.safetensors","a":"y.safetensors"}})", "\"a\" appears twice"},
      {std::string(100'000, '['), "deeper than"},
  };
  for (const auto& [text, reason] : cases) {
    const auto index = parse_shard_index(text, "index.json");
    ASSERT_FALSE(index.ok()) << text.substr(0, 60);
    EXPECT_EQ(index.status().code(), StatusCode::kIoError);
    EXPECT_THAT(index.status().message(), AllOf(HasSubstr("index.json: "), HasSubstr(reason)));
  }
}

TEST(Checkpoint, TensorChecksNameShapeAndType) {
  const TempDir dir;
  dir.write("model.safetensors", safetensors_bytes(R"({"w":{"dtype":"I32","shape":[2,1],"data_offsets":[0,8]}})", 8));
  const auto checkpoint = Checkpoint::open(dir.path());
  ASSERT_TRUE(checkpoint.ok()) << checkpoint.status().message();

  const auto absent = checkpoint->tensor("v", {4, 2});
  ASSERT_FALSE(absent.ok());
  EXPECT_EQ(absent.status().code(), StatusCode::kIoError);
  EXPECT_THAT(absent.status().message(), AllOf(HasSubstr("\"v\" is missing"), HasSubstr("[4, 2]")));

  const auto shape = checkpoint->tensor("w", {1, 2});
  ASSERT_FALSE(shape.ok());
  EXPECT_EQ(shape.status().code(), StatusCode::kIoError);
  EXPECT_THAT(shape.status().message(),
              AllOf(HasSubstr("model.safetensors"), HasSubstr("shape [2, 1]"), HasSubstr("expected [1, 2]")));

  const auto dtype = checkpoint->tensor("w", {2, 1});
  ASSERT_FALSE(dtype.ok());
  EXPECT_EQ(dtype.status().code(), StatusCode::kUnsupported);
  EXPECT_THAT(dtype.status().message(), AllOf(HasSubstr("type I32"), HasSubstr("F32, BF16, F16")));

  EXPECT_TRUE(checkpoint->tensor("w", {2, 1}, {DataType::kI32}).ok());
}

}  // namespace
}  // namespace compact::engine
