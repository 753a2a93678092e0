// Encodes byte strings for the parity tests in tests/python.
//
// compact_tokenize TOKENIZER_JSON [--specials] [--plain] [--time]
//   stdin    records: uint32 length, then as many bytes (little endian, as all supported machines are)
//   stdout   per record: uint32 number of ids, the ids as int32, uint32 length of decode(ids), the decoded bytes
//   --specials   add_special_tokens
//   --plain      the text is not control text
//   --time       processor seconds of encoding, to stderr
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <ctime>
#include <string>
#include <string_view>
#include <vector>

#include "engine/text/tokenizer.h"

namespace {

using compact::engine::TextSegment;
using compact::engine::Tokenizer;

[[noreturn]] void fail(const std::string& message) {
  std::fprintf(stderr, "compact_tokenize: %s\n", message.c_str());
  std::exit(2);
}

bool read_exactly(void* to, size_t num_bytes) { return std::fread(to, 1, num_bytes, stdin) == num_bytes; }

void write_all(const void* from, size_t num_bytes) {
  if (std::fwrite(from, 1, num_bytes, stdout) != num_bytes) fail("stdout is closed");
}

void write_count(size_t count) {
  const auto narrow = static_cast<uint32_t>(count);
  write_all(&narrow, sizeof narrow);
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 2) fail("usage: compact_tokenize TOKENIZER_JSON [--specials] [--plain] [--time]");
  bool add_special_tokens = false;
  bool is_plain = false;
  bool show_time = false;
  for (int i = 2; i < argc; ++i) {
    const std::string_view option = argv[i];
    if (option == "--specials") {
      add_special_tokens = true;
    } else if (option == "--plain") {
      is_plain = true;
    } else if (option == "--time") {
      show_time = true;
    } else {
      fail("unknown option " + std::string(option));
    }
  }
  const compact::Result<Tokenizer> tokenizer = Tokenizer::load(argv[1]);
  if (!tokenizer.ok()) fail(tokenizer.status().message());

  double seconds = 0;
  uint32_t num_bytes = 0;
  while (read_exactly(&num_bytes, sizeof num_bytes)) {
    TextSegment segment{std::string(num_bytes, '\0'), /*is_control=*/!is_plain};
    if (!read_exactly(segment.text.data(), num_bytes)) fail("a record is cut short");
    const std::clock_t begin = std::clock();
    const compact::Result<std::vector<int32_t>> ids = tokenizer->encode_segments({&segment, 1}, add_special_tokens);
    seconds += static_cast<double>(std::clock() - begin) / CLOCKS_PER_SEC;
    if (!ids.ok()) fail(ids.status().message());
    const std::string decoded = tokenizer->decode(*ids, /*skip_special_tokens=*/false);
    write_count(ids->size());
    write_all(ids->data(), ids->size() * sizeof(int32_t));
    write_count(decoded.size());
    write_all(decoded.data(), decoded.size());
  }
  if (show_time) std::fprintf(stderr, "%.6f\n", seconds);
  return 0;
}
