#include "engine/loader/json.h"

#include <fmt/format.h>

#include <stdexcept>
#include <unordered_set>
#include <vector>

namespace compact::engine {
namespace {

using Json = nlohmann::json;

constexpr std::size_t kMaxJsonBytes = std::size_t{64} << 20;
constexpr int kMaxDepth = 64;
constexpr std::size_t kMaxShownBytes = 64;

// Leaves the parser from its callback, which has no other way to stop it.
struct Refused : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// "parse error at line 1, column 3: ..." of the JSON library: without its "[json.exception...]" prefix, and in
// printable ASCII, since it quotes the input.
std::string syntax_message(std::string_view what) {
  if (const auto prefix = what.find("] "); prefix != std::string_view::npos) what.remove_prefix(prefix + 2);
  std::string message(what.substr(0, 200));
  for (char& c : message) {
    if (c < ' ' || c > '~') c = '?';
  }
  return message;
}

}  // namespace

Result<Json> parse_json_object(std::string_view text, std::string_view file_name) {
  if (text.size() > kMaxJsonBytes) {
    return io_error(fmt::format("{}: {} bytes of JSON; allowed: at most {}", file_name, text.size(), kMaxJsonBytes));
  }
  std::vector<std::unordered_set<std::string>> keys_of_open_objects;
  const auto check = [&](int depth, Json::parse_event_t event, Json& parsed) {
    if (depth >= kMaxDepth) throw Refused(fmt::format("nested deeper than {} levels", kMaxDepth));
    switch (event) {
      case Json::parse_event_t::object_start: keys_of_open_objects.emplace_back(); break;
      case Json::parse_event_t::object_end: keys_of_open_objects.pop_back(); break;
      case Json::parse_event_t::key:
        if (!keys_of_open_objects.back().insert(parsed.get_ref<const std::string&>()).second) {
          throw Refused(fmt::format("key {} appears twice in one object", shown(parsed)));
        }
        break;
      default: break;
    }
    return true;
  };
  try {
    Json value = Json::parse(text.begin(), text.end(), check);
    if (!value.is_object()) {
      return io_error(fmt::format("{}: the top level is {}; allowed: a JSON object", file_name, shown(value)));
    }
    return value;
  } catch (const Refused& refused) {
    return io_error(fmt::format("{}: {}", file_name, refused.what()));
  } catch (const Json::exception& error) {
    return io_error(fmt::format("{}: not valid JSON: {}", file_name, syntax_message(error.what())));
  }
}

std::string quote(std::string_view text) {
  const bool cut = text.size() > kMaxShownBytes;
  const Json piece = std::string(text.substr(0, kMaxShownBytes));
  // `replace` also covers a multi-byte character that the cut took apart.
  std::string result = piece.dump(-1, ' ', /*ensure_ascii=*/true, Json::error_handler_t::replace);
  if (cut) result += "...";
  return result;
}

std::string shown(const Json& value) {
  if (value.is_object()) return fmt::format("an object of {} members", value.size());
  if (value.is_array()) return fmt::format("an array of {} elements", value.size());
  if (value.is_string()) return quote(value.get_ref<const std::string&>());
  return value.dump();
}

}  // namespace compact::engine
