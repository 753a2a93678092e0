/// `compact eval`: selectors compared on equal terms; a file for each of its commands.
#include "engine/cli/commands.h"

namespace compact::engine {

CommandBody add_eval_command(CLI::App& app) {
  CLI::App* eval = app.add_subcommand("eval", "Compare selectors: accuracy and recall beside density and time");
  return add_subcommands(*eval, {add_eval_ruler_command, add_eval_compare_command, add_eval_merge_command,
                                 add_eval_recall_command, add_eval_perplexity_command, add_eval_longbench_command});
}

}  // namespace compact::engine
