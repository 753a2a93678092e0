#include "engine/loader/safetensors.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <bit>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <utility>

#include "tests/unit/safetensors_bytes.h"
#include "tests/unit/temp_dir.h"

namespace compact::engine {
namespace {

using ::testing::AllOf;
using testing::as_bytes;
using ::testing::HasSubstr;
using testing::safetensors_bytes;
using testing::TempDir;
using testing::u64_le;

constexpr const char* kTwoTensors = R"({"__metadata__":{"format":"pt"},)"
                                    R"("b":{"dtype":"F32","shape":[2,3],"data_offsets":[4,28]},)"
                                    R"("a":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]}}  )";

template <class T>
T read(const TensorInfo& tensor, std::size_t index) {
  T value;
  std::memcpy(&value, tensor.bytes.data() + index * sizeof(T), sizeof(T));
  return value;
}

TEST(Safetensors, ReadsTensorsAndMetadata) {
  const std::string file = safetensors_bytes(kTwoTensors, 28);
  const auto contents = SafetensorsFile::parse(as_bytes(file), "file");
  ASSERT_TRUE(contents.ok()) << contents.status().message();
  ASSERT_EQ(contents->tensors.size(), 2u);
  const TensorInfo& a = contents->tensors[0];
  EXPECT_EQ(a.name, "a");
  EXPECT_EQ(a.dtype, DataType::kBF16);
  EXPECT_THAT(a.shape, ::testing::ElementsAre(2));
  EXPECT_EQ(a.bytes.size(), 4u);
  const TensorInfo& b = contents->tensors[1];
  EXPECT_THAT(b.shape, ::testing::ElementsAre(2, 3));
  EXPECT_EQ(b.bytes.size(), 24u);
  EXPECT_EQ(b.bytes[0], std::byte{4});  // the data counts 0, 1, 2, ...
  EXPECT_EQ(contents->metadata.at("format"), "pt");
}

TEST(Safetensors, AcceptsAFileWithoutTensors) {
  const auto contents = SafetensorsFile::parse(as_bytes(safetensors_bytes("{}", 0)), "file");
  ASSERT_TRUE(contents.ok()) << contents.status().message();
  EXPECT_TRUE(contents->tensors.empty());
}

// A zero makes a tensor empty whatever stands beside it: the product must not be called an overflow.
TEST(Safetensors, AcceptsAnEmptyTensorBesideHugeExtents) {
  const auto contents = SafetensorsFile::parse(
      as_bytes(safetensors_bytes(
          R"({"e":{"dtype":"F32","shape":[4611686018427387904,4611686018427387904,0],"data_offsets":[0,0]}})", 0)),
      "file");
  ASSERT_TRUE(contents.ok()) << contents.status().message();
  EXPECT_TRUE(contents->tensors[0].bytes.empty());
}

TEST(Safetensors, ReadsAFileOfTheReferencePackage) {
  const auto file = SafetensorsFile::open(CA_TEST_SOURCE_DIR "/golden/mixed.safetensors");
  ASSERT_TRUE(file.ok()) << file.status().message();
  EXPECT_EQ(file->tensors().size(), 15u);
  EXPECT_EQ(file->metadata().at("note"), "line\nbreak");

  struct Expected {
    const char* name;
    DataType dtype;
    std::vector<std::int64_t> shape;
  };
  const Expected all[] = {
      {"f32", DataType::kF32, {2, 3}},
      {"bf16", DataType::kBF16, {4}},
      {"f16", DataType::kF16, {2, 2}},
      {"f64", DataType::kF64, {1}},
      {"f8_e4m3", DataType::kF8E4M3, {3}},
      {"f8_e5m2", DataType::kF8E5M2, {2}},
      {"i8", DataType::kI8, {2}},
      {"i16", DataType::kI16, {1}},
      {"i32", DataType::kI32, {1, 1}},
      {"scalar_i64", DataType::kI64, {}},
      {"u8", DataType::kU8, {3}},
      {"u64", DataType::kU64, {1}},
      {"bool", DataType::kBool, {2}},
      {"empty", DataType::kF32, {0, 4}},
      {"n\xc3\xa4me \"quoted\"", DataType::kF32, {1}},
  };
  for (const Expected& expected : all) {
    const TensorInfo* tensor = file->find(expected.name);
    ASSERT_NE(tensor, nullptr) << expected.name;
    EXPECT_EQ(tensor->dtype, expected.dtype) << expected.name;
    EXPECT_EQ(tensor->shape, expected.shape) << expected.name;
  }
  EXPECT_EQ(read<float>(*file->find("f32"), 4), 4.25f);
  EXPECT_EQ(read<std::uint16_t>(*file->find("bf16"), 3), 0x4380);  // 256
  EXPECT_EQ(read<std::uint16_t>(*file->find("f16"), 1), 0x7bff);   // 65504
  EXPECT_EQ(read<double>(*file->find("f64"), 0), 3.141592653589793);
  EXPECT_EQ(read<std::int64_t>(*file->find("scalar_i64"), 0), -5);
  EXPECT_EQ(read<std::uint64_t>(*file->find("u64"), 0), std::uint64_t{1} << 63);
  EXPECT_EQ(file->find("absent"), nullptr);
}

TEST(Safetensors, TensorsSurviveAMoveOfTheFile) {
  const TempDir dir;
  auto opened = SafetensorsFile::open(dir.write("m.safetensors", safetensors_bytes(kTwoTensors, 28)));
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  const TensorInfo* before = opened->find("b");
  const SafetensorsFile moved = std::move(opened).value();
  EXPECT_EQ(moved.find("b"), before);
  EXPECT_EQ(moved.find("b")->bytes[0], std::byte{4});
}

struct BadFile {
  const char* what;
  std::string bytes;
  std::vector<std::string> words;  // each must stand in the message
  StatusCode code = StatusCode::kIoError;
};

// One tensor entry, so that a case shows only what is wrong with it.
std::string entry(const std::string& fields, std::size_t data_bytes = 8) {
  return safetensors_bytes("{\"w\":{" + fields + "}}", data_bytes);
}

std::vector<BadFile> bad_files() {
  const std::string good = safetensors_bytes(kTwoTensors, 28);
  std::vector<BadFile> cases = {
      {"empty file", "", {"at least 8 bytes", "seen 0"}},
      {"shorter than the length", "1234567", {"at least 8 bytes", "seen 7"}},
      {"length 2^64-1", u64_le(~std::uint64_t{0}) + "{}", {"18446744073709551615 bytes", "at most 100000000"}},
      {"length above the limit", u64_le(100'000'001) + "{}", {"100000001 bytes", "at most 100000000"}},
      {"cut in the header", good.substr(0, 20), {"truncated inside the header", "seen 20"}},
      {"cut in the data",
       good.substr(0, good.size() - 1),
       {"\"b\"", "expected 28 bytes of data, seen 27", "truncated"}},
      {"no header", safetensors_bytes("", 0), {"not valid JSON"}},
      {"not JSON", safetensors_bytes("{\"w\":", 0), {"not valid JSON"}},
      {"invalid UTF-8", safetensors_bytes("{\"\xff\":{}}", 0), {"not valid JSON"}},
      {"text after the object", safetensors_bytes("{}{}", 0), {"not valid JSON"}},
      {"top level list", safetensors_bytes("[]", 0), {"the header is an array", "allowed: an object"}},
      {"top level number", safetensors_bytes("3", 0), {"the header is 3"}},
      {"entry is a string", safetensors_bytes(R"({"w":"x"})", 0), {"\"w\"", "allowed: an object"}},
      {"entry is null", safetensors_bytes(R"({"w":null})", 0), {"\"w\" is null"}},
      {"metadata of numbers", safetensors_bytes(R"({"__metadata__":{"v":1}})", 0), {"\"v\" of __metadata__ is 1"}},
      {"metadata twice", safetensors_bytes(R"({"__metadata__":{},"__metadata__":{}})", 0), {"appears twice"}},
      {"tensor twice",
       safetensors_bytes(R"({"w":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},)"
                         R"("w":{"dtype":"U8","shape":[1],"data_offsets":[1,2]}})",
                         2),
       {"\"w\" appears twice"}},
      {"field twice",
       entry(R"("dtype":"F32","dtype":"F32","shape":[2],"data_offsets":[0,8])"),
       {"\"dtype\" appears twice"}},
      {"no dtype", entry(R"("shape":[2],"data_offsets":[0,8])"), {"\"w\" has no dtype"}},
      {"no shape", entry(R"("dtype":"F32","data_offsets":[0,8])"), {"\"w\" has no shape"}},
      {"no offsets", entry(R"("dtype":"F32","shape":[2])"), {"\"w\" has no data_offsets"}},
      {"unknown field", entry(R"("dtype":"F32","strides":[1])"), {"strides", "allowed: dtype, shape, data_offsets"}},
      {"unknown dtype",
       entry(R"("dtype":"F4","shape":[2],"data_offsets":[0,8])"),
       {"\"F4\"", "BF16"},
       StatusCode::kUnsupported},
      {"dtype is a number", entry(R"("dtype":4,"shape":[2],"data_offsets":[0,8])"), {"dtype of tensor \"w\" is 4"}},
      {"dtype is a list",
       entry(R"("dtype":[1],"shape":[2],"data_offsets":[0,8])"),
       {"dtype of tensor \"w\"", "an array"}},
      {"shape is a number", entry(R"("dtype":"F32","shape":2,"data_offsets":[0,8])"), {"shape of tensor \"w\" is 2"}},
      {"shape is an object",
       entry(R"("dtype":"F32","shape":{},"data_offsets":[0,8])"),
       {"shape of tensor", "an object"}},
      {"negative extent",
       entry(R"("dtype":"F32","shape":[-2],"data_offsets":[0,8])"),
       {"contains -2", "integers from 0"}},
      {"fractional extent", entry(R"("dtype":"F32","shape":[2.0],"data_offsets":[0,8])"), {"contains \"2.0\""}},
      {"nested shape", entry(R"("dtype":"F32","shape":[[2]],"data_offsets":[0,8])"), {"contains an array"}},
      {"extent above 2^63",
       entry(R"("dtype":"F32","shape":[9223372036854775808],"data_offsets":[0,8])"),
       {"contains 9223372036854775808"}},
      {"product overflows",
       entry(R"("dtype":"U8","shape":[4294967296,4294967296,2],"data_offsets":[0,8])"),
       {"more than 2^63 - 1 bytes"}},
      {"bytes overflow",
       entry(R"("dtype":"F64","shape":[2305843009213693952],"data_offsets":[0,8])"),
       {"more than 2^63 - 1 bytes"}},
      {"17 dimensions",
       entry(R"("dtype":"U8","shape":[1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1,1],"data_offsets":[0,8])"),
       {"shape of tensor \"w\" has more than 16"}},
      {"one offset", entry(R"("dtype":"F32","shape":[2],"data_offsets":[0])"), {"has 1 elements; allowed: 2"}},
      {"three offsets", entry(R"("dtype":"F32","shape":[2],"data_offsets":[0,8,8])"), {"has more than 2"}},
      {"negative offset", entry(R"("dtype":"F32","shape":[2],"data_offsets":[-1,7])"), {"contains -1"}},
      {"offsets reversed", entry(R"("dtype":"F32","shape":[2],"data_offsets":[8,0])"), {"[8, 0] are not in order"}},
      {"offsets outside",
       entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,12])"),
       {"end outside the data", "expected 12", "seen 8"}},
      {"huge offset",
       entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,9223372036854775807])"),
       {"end outside the data"}},
      {"size is not shape",
       entry(R"("dtype":"F32","shape":[3],"data_offsets":[0,8])"),
       {"shape [3] of F32 needs 12 bytes", "[0, 8] hold 8"}},
      {"overlap",
       safetensors_bytes(R"({"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                         R"("w":{"dtype":"U8","shape":[4],"data_offsets":[3,7]}})",
                         7),
       {"\"w\" begins at byte 3", "overlaps", "byte 4"}},
      {"empty tensor inside another",
       safetensors_bytes(R"({"v":{"dtype":"U8","shape":[4],"data_offsets":[0,4]},)"
                         R"("w":{"dtype":"U8","shape":[0],"data_offsets":[2,2]}})",
                         4),
       {"\"w\" begins at byte 2", "overlaps"}},
      {"gap at the start", entry(R"("dtype":"U8","shape":[4],"data_offsets":[4,8])"), {"begins at byte 4", "gap"}},
      {"bytes at the end",
       entry(R"("dtype":"U8","shape":[4],"data_offsets":[0,4])"),
       {"cover 4 bytes", "seen 8", "no bytes after"}},
  };
  // A text beyond any stack: the reader must stop at the second level instead of descending.
  cases.push_back({"deep nesting", safetensors_bytes(std::string(1'000'000, '['), 0), {"the header is an array"}});
  return cases;
}

TEST(Safetensors, RefusesBadFilesWithAReason) {
  for (const BadFile& bad : bad_files()) {
    const auto contents = SafetensorsFile::parse(as_bytes(bad.bytes), "weights.safetensors");
    ASSERT_FALSE(contents.ok()) << bad.what;
    EXPECT_EQ(contents.status().code(), bad.code) << bad.what;
    EXPECT_THAT(contents.status().message(), HasSubstr("weights.safetensors: ")) << bad.what;
    for (const std::string& word : bad.words) {
      EXPECT_THAT(contents.status().message(), HasSubstr(word)) << bad.what;
    }
  }
}

// Every prefix of a good file is an interrupted download.
TEST(Safetensors, RefusesEveryTruncation) {
  const std::string good = safetensors_bytes(kTwoTensors, 28);
  ASSERT_TRUE(SafetensorsFile::parse(as_bytes(good), "file").ok());
  for (std::size_t length = 0; length < good.size(); ++length) {
    // A copy of exactly that length, so that a sanitizer sees a read past it.
    const std::vector<char> prefix(good.begin(), good.begin() + static_cast<std::ptrdiff_t>(length));
    const auto contents = SafetensorsFile::parse(as_bytes({prefix.data(), prefix.size()}), "file");
    ASSERT_FALSE(contents.ok()) << length;
    EXPECT_THAT(contents.status().message(), HasSubstr("seen")) << length;
  }
}

TEST(Safetensors, LongNamesAreCutInMessages) {
  const std::string name(5000, 'n');
  const auto contents = SafetensorsFile::parse(as_bytes(safetensors_bytes("{\"" + name + "\":1}", 0)), "file");
  ASSERT_FALSE(contents.ok());
  EXPECT_LT(contents.status().message().size(), 300u);
}

TEST(MappedFile, NamesPathAndSystemError) {
  const TempDir dir;
  const auto absent = MappedFile::open(dir.path() / "absent.bin");
  ASSERT_FALSE(absent.ok());
  EXPECT_EQ(absent.status().code(), StatusCode::kIoError);
  EXPECT_THAT(absent.status().message(), AllOf(HasSubstr("absent.bin"), HasSubstr("No such file or directory")));

  const auto directory = MappedFile::open(dir.path());
  ASSERT_FALSE(directory.ok());
  EXPECT_THAT(directory.status().message(), AllOf(HasSubstr(dir.path().string()), HasSubstr("Is a directory")));

  const auto device = MappedFile::open("/dev/null");
  ASSERT_FALSE(device.ok());
  EXPECT_THAT(device.status().message(), HasSubstr("not a regular file"));
}

TEST(MappedFile, MapsEmptyAndNonEmptyFiles) {
  const TempDir dir;
  const auto empty = MappedFile::open(dir.write("empty", ""));
  ASSERT_TRUE(empty.ok()) << empty.status().message();
  EXPECT_TRUE(empty->bytes().empty());

  auto opened = MappedFile::open(dir.write("three", "abc"));
  ASSERT_TRUE(opened.ok()) << opened.status().message();
  MappedFile first = std::move(opened).value();
  MappedFile second = std::move(first);
  ASSERT_EQ(second.bytes().size(), 3u);
  EXPECT_EQ(second.bytes()[2], std::byte{'c'});
  auto other = MappedFile::open(dir.write("two", "xy"));
  ASSERT_TRUE(other.ok());
  second = std::move(other).value();
  EXPECT_EQ(second.bytes().size(), 2u);
}

}  // namespace
}  // namespace compact::engine
