/// `compact`: dense and compact prefill of Hugging Face checkpoints. Exit codes: 0 success, 2 bad arguments or files,
/// 1 the rest.
#include <fmt/format.h>

#include <CLI/CLI.hpp>
#include <cstdio>
#include <exception>
#include <utility>
#include <vector>

#include "compact/version.h"
#include "engine/cli/commands.h"

namespace {

// Exhausted KV pages count as bad arguments: the user chose too few for the prompt.
int exit_code(const compact::Status& status) {
  if (status.ok()) return 0;
  using compact::StatusCode;
  return status.code() == StatusCode::kInternal || status.code() == StatusCode::kCudaError ? 1 : 2;
}

}  // namespace

int main(int argc, char** argv) {
  CLI::App app("Chunked sparse prefill over a paged KV cache: dense and compact by one kernel", "compact");
  app.set_version_flag("--version", CA_VERSION_STRING);
  app.require_subcommand(1);
  std::vector<std::pair<CLI::App*, compact::engine::CommandBody>> commands;
  for (const auto add : {compact::engine::add_run_command, compact::engine::add_demo_command,
                         compact::engine::add_eval_command, compact::engine::add_calibrate_command,
                         compact::engine::add_bench_command, compact::engine::add_doctor_command}) {
    auto body = add(app);
    commands.emplace_back(app.get_subcommands({}).back(), std::move(body));
  }
  try {
    app.parse(argc, argv);
    for (const auto& [command, body] : commands) {
      if (!command->parsed()) continue;
      const compact::Status status = body();
      if (!status.ok()) fmt::print(stderr, "compact {}: {}\n", command->get_name(), status.message());
      return exit_code(status);
    }
    return 0;
  } catch (const CLI::ParseError& error) {
    return app.exit(error) == 0 ? 0 : 2;  // --help and --version are "errors" with exit code 0
  } catch (const std::bad_alloc&) {
    fmt::print(stderr, "compact: out of memory\n  try: a shorter prompt, a smaller --chunk or --kv-dtype bf16\n");
  } catch (const std::exception& error) {
    fmt::print(stderr, "compact: internal error: {}\n", error.what());
  }
  return 1;
}
