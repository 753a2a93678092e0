/// The subcommands of `compact`. Each adds itself to the command line; main runs the one that was named.
#pragma once

#include <CLI/CLI.hpp>
#include <functional>
#include <initializer_list>

#include "compact/status.h"

namespace compact::engine {

using CommandBody = std::function<Status()>;

/// A command that consists of others, of which one must be named.
CommandBody add_subcommands(CLI::App& parent, std::initializer_list<CommandBody (*)(CLI::App&)> adders);

CommandBody add_run_command(CLI::App& app);
CommandBody add_demo_command(CLI::App& app);
CommandBody add_eval_command(CLI::App& app);
CommandBody add_calibrate_command(CLI::App& app);
CommandBody add_bench_command(CLI::App& app);
CommandBody add_doctor_command(CLI::App& app);

// Subcommands of `compact eval`.
CommandBody add_eval_ruler_command(CLI::App& eval);
CommandBody add_eval_compare_command(CLI::App& eval);
CommandBody add_eval_merge_command(CLI::App& eval);
CommandBody add_eval_recall_command(CLI::App& eval);
CommandBody add_eval_perplexity_command(CLI::App& eval);
CommandBody add_eval_longbench_command(CLI::App& eval);

// Subcommands of `compact bench`.
CommandBody add_bench_attention_command(CLI::App& bench);
CommandBody add_bench_prefill_command(CLI::App& bench);
CommandBody add_bench_step_command(CLI::App& bench);
CommandBody add_bench_select_command(CLI::App& bench);

}  // namespace compact::engine
