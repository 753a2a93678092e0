#include "engine/cli/selector_spec.h"

#include <fmt/format.h>

#include <algorithm>
#include <nlohmann/json.hpp>

#include "engine/eval/digest.h"
#include "engine/loader/text_file.h"

namespace compact::engine {

std::vector<std::string> split_list(std::string_view text, char separator) {
  std::vector<std::string> parts;
  for (std::size_t begin = 0; begin <= text.size();) {
    const std::size_t end = std::min(text.find(separator, begin), text.size());
    if (end > begin) parts.emplace_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::vector<std::string> split_selectors(std::string_view text) {
  std::vector<std::string> specs;
  for (const std::string& part : split_list(text)) {
    // No selector's name holds '=': "min=2" of "mean-key:budget=density=0.1,min=2" goes on with what stands before it.
    const bool continues = part.substr(0, part.find(':')).find('=') != std::string::npos;
    if (continues && !specs.empty()) {
      specs.back() += "," + part;
    } else {
      specs.push_back(part);
    }
  }
  return specs;
}

Result<GenerateFlags> parse_selector_spec(const GenerateFlags& base, std::string_view spec) {
  const std::vector<std::string> parts = split_list(spec, ':');
  if (parts.empty() || spec.starts_with(':')) {
    return invalid_argument(fmt::format("selector '{}' has no name\n  allowed: {}", spec, selector_names()));
  }
  GenerateFlags flags = base;
  flags.selector = parts.front();
  CLI::App app;
  flags.add_prefill_to(app);
  std::vector<std::string> arguments;  // CLI11 takes them from the back
  for (std::size_t i = parts.size() - 1; i > 0; --i) {
    const std::string name = parts[i].substr(0, parts[i].find('='));
    if (name == "chat" || name == "threads" || name == "backend") {
      return invalid_argument(
          fmt::format("selector '{}': --{} must be the same for all selectors\n  try: --{} itself", spec, name, name));
    }
    arguments.push_back("--" + parts[i]);
  }
  try {
    app.parse(arguments);
  } catch (const CLI::ParseError& error) {
    return invalid_argument(
        fmt::format("selector '{}': {}\n  allowed: name:flag=value, e.g. mean-key:share=0.1", spec, error.what()));
  }
  return flags;
}

nlohmann::json prefill_flag_values(GenerateFlags flags) {
  // Figures belong to what was computed and where, not to the "auto" that chose it.
  if (const Result<GenerateFlags::Place> place = flags.resolve_place(); place.ok()) {
    flags.backend = backend_name(place->backend);
    flags.kv_dtype = dtype_name(place->kv_dtype);
  }
  CLI::App app;
  flags.add_prefill_to(app);
  nlohmann::json values = nlohmann::json::object();
  for (CLI::Option* option : app.get_options()) {
    const std::string name = option->get_single_name();
    if (name == "help" || name == "threads") continue;
    option->capture_default_str();  // the variable's value now
    values[name] = option->get_default_str();
  }
  // A file counts by what is in it, not by its name; one that cannot be read is refused elsewhere.
  if (!flags.calibration.empty()) {
    const auto text = read_text_file(flags.calibration);
    values["calibration"] = text.ok() ? hex_digest(fnv1a64(*text)) : flags.calibration;
  }
  return values;
}

}  // namespace compact::engine
