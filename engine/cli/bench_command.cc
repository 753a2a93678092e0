/// `compact bench`: speed on made-up data, beside dense of the same backend; a file for each of its commands.
#include "engine/cli/commands.h"

namespace compact::engine {

CommandBody add_bench_command(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Time a prefill, or parts of it, beside dense of the same backend");
  return add_subcommands(*bench, {add_bench_prefill_command, add_bench_step_command, add_bench_select_command,
                                  add_bench_attention_command});
}

}  // namespace compact::engine
