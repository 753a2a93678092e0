#include "engine/cli/commands.h"

#include <utility>
#include <vector>

namespace compact::engine {

CommandBody add_subcommands(CLI::App& parent, std::initializer_list<CommandBody (*)(CLI::App&)> adders) {
  parent.require_subcommand(1);
  std::vector<std::pair<CLI::App*, CommandBody>> commands;
  for (const auto add : adders) {
    CommandBody body = add(parent);
    commands.emplace_back(parent.get_subcommands({}).back(), std::move(body));
  }
  return [commands]() -> Status {
    for (const auto& [command, body] : commands) {
      if (command->parsed()) return body();
    }
    return {};
  };
}

}  // namespace compact::engine
