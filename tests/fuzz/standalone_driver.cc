// main() for the fuzz targets where the compiler has no libFuzzer (g++).
//
// Runs every file of the corpus, then mutated and spliced copies of them until the time is over. There is no coverage
// feedback: the strength lies in a good corpus and a sanitizer build. The same seed gives the same inputs in order.
//
//   safetensors_fuzz tests/fuzz/corpus/safetensors --seconds 60 [--seed N] [--max-bytes N] [--artifact FILE]
//
// Each input is placed in a file mapping before it runs, so that whatever ends the process (a signal, a sanitizer, a
// kill) leaves it behind, by default as last_input.bin. Reproduce with that file as the only argument. Exit status: 0,
// or 2 for wrong arguments; a finding ends the process as the finding does, a hang with 70.

#include <fcntl.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <charconv>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <random>
#include <string>
#include <string_view>
#include <vector>

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size);
extern "C" __attribute__((weak)) int LLVMFuzzerInitialize(int* argc, char*** argv);
// Present in a sanitizer build: called before a report ends the process without any signal.
extern "C" __attribute__((weak)) void __sanitizer_set_death_callback(void (*callback)());

namespace {

using Bytes = std::vector<std::uint8_t>;
using Clock = std::chrono::steady_clock;

constexpr unsigned kHangSeconds = 20;  // for one input; generous for sanitizers on a loaded machine
constexpr int kFatalSignals[] = {SIGSEGV, SIGBUS, SIGILL, SIGFPE, SIGABRT};

struct Options {
  std::vector<std::filesystem::path> inputs;
  double seconds = 0;
  std::uint64_t seed = 1;
  std::size_t max_bytes = std::size_t{1} << 16;
  std::string artifact = "last_input.bin";
};

// The input that is running. Plain globals: signal handlers use them.
int artifact_fd = -1;
std::uint8_t* artifact_bytes = nullptr;
std::size_t artifact_capacity = 0;
volatile std::size_t artifact_size = 0;
const char* artifact_name = "";
struct sigaction previous_actions[std::size(kFatalSignals)];

void say(const char* text) { [[maybe_unused]] const auto written = ::write(STDERR_FILENO, text, std::strlen(text)); }

void keep_artifact() {
  // The mapping is as long as the longest input; the file shall be exactly this one.
  [[maybe_unused]] const int rc = ::ftruncate(artifact_fd, static_cast<off_t>(artifact_size));
  say("\nfuzz: the input is in ");
  say(artifact_name);
  say("\n");
}

void on_fatal_signal(int signal) {
  keep_artifact();
  // Back to whoever listened before, a sanitizer perhaps: returning repeats the fault there, with its address.
  for (std::size_t i = 0; i < std::size(kFatalSignals); ++i) {
    if (kFatalSignals[i] == signal) ::sigaction(signal, &previous_actions[i], nullptr);
  }
}

void on_hang(int) {
  say("\nfuzz: hang");
  keep_artifact();
  ::_exit(70);
}

bool open_artifact(const Options& options, std::size_t capacity) {
  artifact_name = options.artifact.c_str();
  artifact_capacity = std::max<std::size_t>(capacity, 1);
  artifact_fd = ::open(artifact_name, O_RDWR | O_CREAT | O_TRUNC | O_CLOEXEC, 0644);
  if (artifact_fd < 0 || ::ftruncate(artifact_fd, static_cast<off_t>(artifact_capacity)) != 0) return false;
  void* mapping = ::mmap(nullptr, artifact_capacity, PROT_READ | PROT_WRITE, MAP_SHARED, artifact_fd, 0);
  if (mapping == MAP_FAILED) return false;
  artifact_bytes = static_cast<std::uint8_t*>(mapping);

  struct sigaction action = {};
  action.sa_handler = on_fatal_signal;
  for (std::size_t i = 0; i < std::size(kFatalSignals); ++i) {
    ::sigaction(kFatalSignals[i], &action, &previous_actions[i]);
  }
  action.sa_handler = on_hang;
  ::sigaction(SIGALRM, &action, nullptr);
  if (__sanitizer_set_death_callback) __sanitizer_set_death_callback(keep_artifact);
  return true;
}

void run_one(const Bytes& input) {
  artifact_size = input.size();
  if (!input.empty()) std::memcpy(artifact_bytes, input.data(), input.size());
  // A heap copy of exactly this size, which no earlier capacity hides from the sanitizer.
  const Bytes exact(input.begin(), input.end());
  ::alarm(kHangSeconds);
  LLVMFuzzerTestOneInput(exact.data(), exact.size());
  ::alarm(0);
}

// Small edits, several of which make one new input.
class Mutator {
 public:
  Mutator(const std::vector<Bytes>& corpus, std::uint64_t seed, std::size_t max_bytes)
      : corpus_(corpus), max_bytes_(max_bytes), random_(seed) {}

  Bytes next() {
    Bytes input = corpus_[below(corpus_.size())];
    const std::size_t num_edits = 1 + below(below(4) == 0 ? 16 : 4);
    for (std::size_t i = 0; i < num_edits; ++i) edit(input);
    if (input.size() > max_bytes_) input.resize(max_bytes_);
    return input;
  }

 private:
  // In [0, bound). Modulo instead of a distribution: the sequence is the same with every standard library.
  std::size_t below(std::size_t bound) { return bound == 0 ? 0 : static_cast<std::size_t>(random_() % bound); }
  std::ptrdiff_t position(const Bytes& input) { return static_cast<std::ptrdiff_t>(below(input.size() + 1)); }
  std::uint8_t byte() { return static_cast<std::uint8_t>(below(256)); }

  // Mostly short, now and then anything up to the whole.
  std::size_t length(std::size_t limit) { return below(std::min<std::size_t>(limit, below(8) == 0 ? limit : 16) + 1); }

  void edit(Bytes& input) {
    if (input.empty()) {
      input.push_back(byte());
      return;
    }
    switch (below(10)) {
      case 0: input[below(input.size())] ^= static_cast<std::uint8_t>(1u << below(8)); break;
      case 1: input[below(input.size())] = byte(); break;
      case 2: insert_random(input); break;
      case 3: erase(input); break;
      case 4: input.resize(below(input.size())); break;
      case 5: write_integer(input); break;
      case 6: write_digits(input); break;
      case 7: copy_piece(input, input); break;
      case 8: copy_piece(input, corpus_[below(corpus_.size())]); break;
      case 9: splice(input); break;
    }
  }

  void insert_random(Bytes& input) {
    // Repeats of one byte find what depth and length limits miss; the characters are those with a meaning in text.
    static constexpr std::string_view kMeaningful = "{}[]\",:\\0-9.e \n\t<>|/u\xff\x80\xc3";
    const std::uint8_t value = below(2) ? byte() : static_cast<std::uint8_t>(kMeaningful[below(kMeaningful.size())]);
    input.insert(input.begin() + position(input), below(16) == 0 ? below(2000) : 1 + below(8), value);
  }

  void erase(Bytes& input) {
    const std::size_t count = length(input.size());
    const auto at = static_cast<std::ptrdiff_t>(below(input.size() - count + 1));
    input.erase(input.begin() + at, input.begin() + at + static_cast<std::ptrdiff_t>(count));
  }

  std::uint64_t interesting() {
    static constexpr std::array<std::uint64_t, 20> kValues = {0,
                                                              1,
                                                              2,
                                                              7,
                                                              8,
                                                              16,
                                                              127,
                                                              128,
                                                              255,
                                                              256,
                                                              32767,
                                                              65535,
                                                              65536,
                                                              100'000'000,
                                                              0x7fffffff,
                                                              0x80000000,
                                                              0xffffffff,
                                                              0x7fffffffffffffff,
                                                              0x8000000000000000,
                                                              0xffffffffffffffff};
    return kValues[below(kValues.size())] + below(3) - 1;
  }

  void write_integer(Bytes& input) {
    const std::uint64_t value = interesting();
    const std::size_t width = std::size_t{1} << below(4);
    // Often at the start, where binary formats keep their lengths.
    const std::size_t at = below(4) == 0 ? 0 : below(input.size());
    for (std::size_t i = 0; i < width && at + i < input.size(); ++i) {
      input[at + i] = static_cast<std::uint8_t>(value >> (8 * i));
    }
  }

  // A number of a text becomes another one.
  void write_digits(Bytes& input) {
    const auto is_digit = [](std::uint8_t c) { return c >= '0' && c <= '9'; };
    auto begin = std::find_if(input.begin() + position(input), input.end(), is_digit);
    if (begin == input.end()) begin = std::find_if(input.begin(), input.end(), is_digit);
    auto end = std::find_if_not(begin, input.end(), is_digit);
    std::string digits = std::to_string(below(2) ? interesting() : below(64));
    if (below(8) == 0) digits.insert(digits.begin(), '-');
    if (below(8) == 0) digits += "e5";
    input.insert(input.erase(begin, end), digits.begin(), digits.end());
  }

  void copy_piece(Bytes& input, const Bytes& source) {
    if (source.empty()) return;
    const std::size_t count = length(source.size());
    const auto from = static_cast<std::ptrdiff_t>(below(source.size() - count + 1));
    // A copy, since the source may be the input itself.
    const Bytes piece(source.begin() + from, source.begin() + from + static_cast<std::ptrdiff_t>(count));
    input.insert(input.begin() + position(input), piece.begin(), piece.end());
  }

  void splice(Bytes& input) {
    const Bytes& other = corpus_[below(corpus_.size())];
    input.resize(below(input.size() + 1));
    input.insert(input.end(), other.begin() + position(other), other.end());
  }

  const std::vector<Bytes>& corpus_;
  std::size_t max_bytes_;
  std::mt19937_64 random_;
};

template <class T>
bool parse_number(std::string_view text, T& value) {
  const auto [end, error] = std::from_chars(text.data(), text.data() + text.size(), value);
  return error == std::errc() && end == text.data() + text.size();
}

bool parse_arguments(int argc, char** argv, Options& options) {
  for (int i = 1; i < argc; ++i) {
    const std::string_view name = argv[i];
    if (!name.starts_with("--")) {
      options.inputs.emplace_back(name);
      continue;
    }
    if (++i == argc) return false;
    const std::string_view value = argv[i];
    if (name == "--artifact") {
      options.artifact = value;
    } else if (name == "--seconds" ? !parse_number(value, options.seconds)
               : name == "--seed"  ? !parse_number(value, options.seed)
                                   : name != "--max-bytes" || !parse_number(value, options.max_bytes)) {
      return false;
    }
  }
  return !options.inputs.empty();
}

bool read_file(const std::filesystem::path& path, std::vector<Bytes>& corpus) {
  std::ifstream file(path, std::ios::binary);
  if (!file) return false;
  corpus.emplace_back(std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>());
  return true;
}

// Sorted by path, since a seed has to mean the same on every file system.
bool read_corpus(const Options& options, std::vector<Bytes>& corpus) {
  std::vector<std::filesystem::path> files;
  for (const auto& input : options.inputs) {
    std::error_code error;
    if (!std::filesystem::is_directory(input, error)) {
      files.push_back(input);
      continue;
    }
    for (const auto& found : std::filesystem::recursive_directory_iterator(input)) {
      if (found.is_regular_file()) files.push_back(found.path());
    }
  }
  std::sort(files.begin(), files.end());
  for (const auto& file : files) {
    if (!read_file(file, corpus)) {
      std::fprintf(stderr, "fuzz: cannot read %s\n", file.c_str());
      return false;
    }
  }
  return !corpus.empty();
}

}  // namespace

int main(int argc, char** argv) {
  if (LLVMFuzzerInitialize) LLVMFuzzerInitialize(&argc, &argv);
  Options options;
  if (!parse_arguments(argc, argv, options)) {
    std::fprintf(stderr,
                 "usage: %s CORPUS... [--seconds N] [--seed N] [--max-bytes N] [--artifact FILE]\n"
                 "  CORPUS: files or directories; without --seconds they are only run\n",
                 argv[0]);
    return 2;
  }
  std::vector<Bytes> corpus;
  if (!read_corpus(options, corpus)) {
    std::fprintf(stderr, "fuzz: no corpus\n");
    return 2;
  }
  std::size_t capacity = options.max_bytes;
  for (const Bytes& input : corpus) capacity = std::max(capacity, input.size());
  if (!open_artifact(options, capacity)) {
    std::fprintf(stderr, "fuzz: cannot write %s: %s\n", artifact_name, std::strerror(errno));
    return 2;
  }

  std::printf("fuzz: %zu corpus files, seed %llu, %g s\n", corpus.size(), static_cast<unsigned long long>(options.seed),
              options.seconds);
  std::fflush(stdout);
  for (const Bytes& input : corpus) run_one(input);

  Mutator mutator(corpus, options.seed, options.max_bytes);
  const auto start = Clock::now();
  const auto elapsed_seconds = [&] { return std::chrono::duration<double>(Clock::now() - start).count(); };
  std::uint64_t num_runs = 0;
  while (elapsed_seconds() < options.seconds) {
    run_one(mutator.next());
    ++num_runs;
  }
  std::printf("fuzz: %llu mutated inputs, no finding\n", static_cast<unsigned long long>(num_runs));
  ::unlink(artifact_name);
  return 0;
}
