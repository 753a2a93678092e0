/// A checkpoint ready to answer: weights, tokenizer, chat format.
#pragma once

#include <cstdint>
#include <filesystem>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "compact/status.h"
#include "compact/thread_pool.h"
#include "engine/model/backend.h"
#include "engine/model/model.h"
#include "engine/scheduler/generate.h"
#include "engine/text/chat_format.h"
#include "engine/text/tokenizer.h"

namespace compact::engine {

struct LoadedModel {
  std::unique_ptr<Model> transformer;
  Tokenizer tokenizer;
  ChatFormat chat_format = ChatFormat::kNone;
  std::vector<std::int32_t> end_tokens;  // of the model's configuration and of the chat format
};

/// chat: "auto" (what the checkpoint's template says) or a format name.
/// Errors: kIoError for a directory without a checkpoint; those of the loaders; kInvalidArgument if the tokenizer has
/// tokens that the embedding has no row for.
[[nodiscard]] Result<LoadedModel> load_model(const std::filesystem::path& directory, const std::string& chat,
                                             Backend backend = Backend::kCpu);

/// The prompt's ids in the model's chat format.
[[nodiscard]] Result<std::vector<std::int32_t>> encode_prompt(const LoadedModel& model, std::string_view prompt);

struct Answer {
  std::string text;         // well-formed UTF-8, special tokens left out
  double ttft_seconds = 0;  // tokenization and prefill up to the first token
  GenerateResult result;
};

/// Encodes, prefills, decodes. `on_text` gets the answer piece by piece. Progress of a long prefill goes to stderr if
/// that is a terminal.
[[nodiscard]] Result<Answer> answer_prompt(const LoadedModel& model, std::string_view prompt, GenerateOptions options,
                                           const std::function<void(std::string_view)>& on_text, ThreadPool& pool);

}  // namespace compact::engine
