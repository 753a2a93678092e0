#include "engine/scheduler/answer.h"

#include <fmt/format.h>

#include <optional>
#include <system_error>
#include <utility>

#include "engine/cuda/cuda_model.h"
#include "engine/model/stopwatch.h"
#include "engine/model/transformer.h"
#include "engine/report/progress.h"
#include "engine/text/utf8.h"

namespace compact::engine {

namespace {

Result<std::unique_ptr<Model>> load_transformer(const std::filesystem::path& directory, Backend backend) {
  if (backend == Backend::kCuda) return load_cuda_model(directory);
  CA_ASSIGN_OR_RETURN(Transformer transformer, Transformer::load(directory));
  return std::unique_ptr<Model>(std::make_unique<Transformer>(std::move(transformer)));
}

}  // namespace

Result<LoadedModel> load_model(const std::filesystem::path& directory, const std::string& chat, Backend backend) {
  std::error_code error;
  if (!std::filesystem::is_directory(directory, error)) {
    return io_error(
        fmt::format("{} is not a directory\n  allowed: a Hugging Face model directory with config.json, "
                    "model.safetensors and tokenizer.json",
                    directory.string()));
  }
  // A misspelt format should not cost the time to load.
  std::optional<ChatFormat> format;
  if (chat != "auto") {
    CA_ASSIGN_OR_RETURN(format, parse_chat_format(chat));
  }
  CA_ASSIGN_OR_RETURN(std::unique_ptr<Model> transformer, load_transformer(directory, backend));
  CA_ASSIGN_OR_RETURN(Tokenizer tokenizer, Tokenizer::load(directory / "tokenizer.json"));
  if (!format) {
    CA_ASSIGN_OR_RETURN(format, load_chat_format(directory));
  }
  CA_RETURN_IF_ERROR(check_chat_format(*format, tokenizer));
  if (tokenizer.vocab_size() > transformer->config().vocab_size) {
    return invalid_argument(
        fmt::format("{}: tokenizer.json has ids up to {}, the model only {} embeddings\n"
                    "  allowed: the tokenizer that belongs to the model",
                    directory.string(), tokenizer.vocab_size() - 1, transformer->config().vocab_size));
  }
  std::vector<std::int32_t> end_tokens = transformer->config().eos_token_ids;
  const std::string_view turn_end = chat_turn_end(*format);
  if (!turn_end.empty()) {
    if (const auto id = tokenizer.token_id(turn_end)) end_tokens.push_back(*id);
  }
  return LoadedModel{std::move(transformer), std::move(tokenizer), *format, std::move(end_tokens)};
}

Result<std::vector<std::int32_t>> encode_prompt(const LoadedModel& model, std::string_view prompt) {
  CA_ASSIGN_OR_RETURN(const ChatPrompt chat, format_chat(model.chat_format, prompt));
  return model.tokenizer.encode_segments(chat.segments, chat.add_special_tokens);
}

Result<Answer> answer_prompt(const LoadedModel& model, std::string_view prompt, GenerateOptions options,
                             const std::function<void(std::string_view)>& on_text, ThreadPool& pool) {
  const Stopwatch stopwatch;
  CA_ASSIGN_OR_RETURN(const std::vector<std::int32_t> tokens, encode_prompt(model, prompt));
  const double encode_seconds = stopwatch.seconds();

  Answer answer;
  Utf8Stream stream;
  const auto emit = [&](const std::string& text) {
    answer.text += text;
    if (on_text && !text.empty()) on_text(text);
  };
  GenerateCallbacks callbacks;
  callbacks.on_prefill = [&](std::int32_t done, std::int32_t total) {
    show_progress("prefill", static_cast<double>(done) / total,
                  fmt::format("{} / {} tokens  {:.1f} s", done, total, stopwatch.seconds()), done == total);
  };
  callbacks.on_token = [&](std::int32_t token) { emit(stream.push(model.tokenizer.decode(std::span(&token, 1)))); };

  options.end_tokens = model.end_tokens;
  CA_ASSIGN_OR_RETURN(answer.result, generate(*model.transformer, tokens, options, callbacks, pool));
  emit(stream.finish());
  answer.ttft_seconds = encode_seconds + answer.result.prefill_seconds;
  return answer;
}

}  // namespace compact::engine
