/// `compact bench`: speed on made-up data, beside dense of the same backend; a file for each of its commands.
#include <utility>
#include <vector>

#include "engine/cli/commands.h"

namespace compact::engine {

CommandBody add_bench_command(CLI::App& app) {
  CLI::App* bench = app.add_subcommand("bench", "Time parts of a prefill beside dense of the same backend");
  bench->require_subcommand(1);
  return add_bench_step_command(*bench);
}

}  // namespace compact::engine
