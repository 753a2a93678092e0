/// `compact bench`: speed on made-up data, beside dense of the same backend; a file for each of its commands.
#include <utility>
#include <vector>

#include "engine/cli/commands.h"

namespace compact::engine {

CommandBody add_bench_command(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Time parts of a prefill beside dense of the same backend");
  bench->require_subcommand(1);
  std::vector<std::pair<CLI::App*, CommandBody>> commands;
  for (const auto add : {add_bench_step_command, add_bench_select_command}) {
    auto body = add(*bench);
    commands.emplace_back(bench->get_subcommands({}).back(), std::move(body));
  }
  return [commands]() -> Status {
    for (const auto& [command, body] : commands) {
      if (command->parsed()) return body();
    }
    return {};
  };
}

}  // namespace compact::engine
