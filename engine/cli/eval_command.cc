/// `compact eval`: selectors compared on equal terms; a file for each of its commands.
#include <utility>
#include <vector>

#include "engine/cli/commands.h"

namespace compact::engine {

CommandBody add_eval_command(CLI::App& app) {
  CLI::App* eval = app.add_subcommand("eval", "Compare selectors: accuracy and recall beside density and time");
  eval->require_subcommand(1);
  std::vector<std::pair<CLI::App*, CommandBody>> commands;
  for (const auto add : {add_eval_ruler_command, add_eval_compare_command, add_eval_merge_command,
                         add_eval_recall_command, add_eval_perplexity_command, add_eval_longbench_command}) {
    CommandBody body = add(*eval);
    commands.emplace_back(eval->get_subcommands({}).back(), std::move(body));
  }
  return [commands]() -> Status {
    for (const auto& [command, body] : commands) {
      if (command->parsed()) return body();
    }
    return {};
  };
}

}  // namespace compact::engine
