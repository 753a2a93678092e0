// Reads tokenizer.json. The file comes from outside: every key is checked before it is used, and whatever would change
// ids and is not implemented is refused.
#include <fmt/format.h>

#include <algorithm>
#include <fstream>
#include <iterator>
#include <limits>
#include <nlohmann/json.hpp>

#include "engine/text/normalizer.h"
#include "engine/text/tokenizer.h"
#include "engine/text/tokenizer_impl.h"
#include "engine/text/utf8.h"

namespace compact::engine {
namespace {

using Json = nlohmann::json;

constexpr size_t kMaxFileBytes = size_t{256} << 20;  // the largest in use has 20 MB
constexpr size_t kMaxMessageBytes = 600;             // a file must not choose the length of our messages
constexpr size_t kMaxAddedTokenBytes = 1024;         // bounds the work at each position of a text
constexpr int32_t kMaxSequenceDepth = 8;

// The value of `key` in an object, or null.
const Json& get(const Json& object, const std::string& key) {
  static const Json kNull;
  const auto member = object.find(key);
  return member == object.end() ? kNull : *member;
}

Status missing(std::string_view key, std::string_view wanted, const Json& seen) {
  return io_error(
      fmt::format("key \"{}\": expected {}, found {}", key, wanted, seen.is_null() ? "nothing" : seen.type_name()));
}

Result<bool> get_bool(const Json& object, const char* key, bool value_if_missing) {
  const Json& value = get(object, key);
  if (value.is_null()) return value_if_missing;
  if (!value.is_boolean()) return missing(key, "a boolean", value);
  return value.get<bool>();
}

Result<int64_t> get_id(const Json& value, std::string_view key) {
  if (!value.is_number_integer()) return missing(key, "an integer", value);
  if (value.is_number_unsigned()) {
    const auto wide = value.get<uint64_t>();
    return static_cast<int64_t>(std::min<uint64_t>(wide, std::numeric_limits<int64_t>::max()));
  }
  return value.get<int64_t>();
}

Result<std::string> get_string(const Json& object, const char* key) {
  const Json& value = get(object, key);
  if (!value.is_string()) return missing(key, "a string", value);
  return value.get<std::string>();
}

// A value for a message. Only scalars are written out: nlohmann's dump() recurses, and a file may nest a million deep.
std::string shown(const Json& value) { return value.is_structured() ? value.type_name() : value.dump(); }

// A setting that must stay at a value for which it does nothing.
Status require_absent(const Json& model, const char* key) {
  const Json& value = get(model, key);
  if (value.is_null() || (value.is_string() && value.get_ref<const std::string&>().empty())) return {};
  return unsupported(fmt::format("model.{} is {}; allowed: null or \"\"", key, shown(value)));
}

// Calls `visit` on a component, or on the parts of a Sequence in order.
template <class Visit>
Status for_each_part(const Json& component, const char* what, const char* list_key, Visit visit, int32_t depth = 0) {
  if (!component.is_object()) return missing(what, "an object", component);
  CA_ASSIGN_OR_RETURN(const std::string type, get_string(component, "type"));
  if (type != "Sequence") return visit(component, type);
  if (depth >= kMaxSequenceDepth) {
    return unsupported(fmt::format("{}: Sequence nested deeper than {}", what, kMaxSequenceDepth));
  }
  const Json& parts = get(component, list_key);
  if (!parts.is_array()) return missing(fmt::format("{}.{}", what, list_key), "an array", parts);
  for (const Json& part : parts) CA_RETURN_IF_ERROR(for_each_part(part, what, list_key, visit, depth + 1));
  return {};
}

Status unsupported_type(std::string_view what, std::string_view type, std::string_view allowed) {
  return unsupported(fmt::format("{} of type \"{}\"; allowed: {}", what, type, allowed));
}

}  // namespace

class TokenizerReader {
 public:
  static Result<Tokenizer> read(std::string_view text) {
    if (text.size() > kMaxFileBytes) {
      return unsupported(fmt::format("{} bytes; allowed: {}", text.size(), kMaxFileBytes));
    }
    Json root;
    try {
      root = Json::parse(text);
    } catch (const Json::exception& error) {
      return io_error(fmt::format("not JSON: {}", error.what()));
    }
    if (!root.is_object()) return missing("(root)", "an object", root);

    TokenizerReader reader;
    CA_RETURN_IF_ERROR(reader.read_model(get(root, "model")));
    CA_RETURN_IF_ERROR(reader.read_normalizer(get(root, "normalizer")));
    CA_RETURN_IF_ERROR(reader.read_pre_tokenizer(get(root, "pre_tokenizer")));
    CA_RETURN_IF_ERROR(reader.read_added_tokens(get(root, "added_tokens")));
    CA_RETURN_IF_ERROR(reader.read_post_processor(get(root, "post_processor")));
    CA_RETURN_IF_ERROR(reader.read_decoder(get(root, "decoder")));
    return Tokenizer(std::move(reader.impl_));
  }

 private:
  Status read_model(const Json& model) {
    if (!model.is_object()) return missing("model", "an object", model);
    const Json& type = get(model, "type");
    if (type.is_string() ? type != "BPE" : !type.is_null()) {
      return unsupported_type("model", type.is_string() ? type.get<std::string>() : type.type_name(), "BPE");
    }
    if (type.is_null() && !model.contains("merges")) return missing("model.type", "\"BPE\"", type);

    // unk_token, fuse_unk and byte_fallback act on characters without a token. There are none: all 256 bytes have one.
    const Json& dropout = get(model, "dropout");
    if (!dropout.is_null() && !(dropout.is_number() && dropout.get<double>() == 0.0)) {
      return unsupported(fmt::format("model.dropout is {}; allowed: null or 0", shown(dropout)));
    }
    CA_RETURN_IF_ERROR(require_absent(model, "continuing_subword_prefix"));
    CA_RETURN_IF_ERROR(require_absent(model, "end_of_word_suffix"));

    const Json& vocab = get(model, "vocab");
    if (!vocab.is_object()) return missing("model.vocab", "an object", vocab);
    for (const auto& [spelling, id_json] : vocab.items()) {
      CA_ASSIGN_OR_RETURN(const int64_t id, get_id(id_json, "model.vocab"));
      CA_RETURN_IF_ERROR(impl_->vocabulary.add(spelling, id));
    }
    impl_->vocab_size = impl_->vocabulary.id_limit();
    return read_merges(model);
  }

  Status read_merges(const Json& model) {
    const Json& list = get(model, "merges");
    if (!list.is_array()) return missing("model.merges", "an array", list);
    std::vector<MergeSpelling> merges;
    merges.reserve(list.size());
    for (const Json& entry : list) {
      if (entry.is_string()) {
        const std::string_view text = entry.get_ref<const std::string&>();
        if (text.starts_with("#version")) continue;  // a heading that older files kept from merges.txt
        const size_t space = text.find(' ');
        if (space == std::string_view::npos || text.find(' ', space + 1) != std::string_view::npos) {
          return io_error(fmt::format("key \"model.merges\": expected two tokens and a space, found \"{}\"", text));
        }
        merges.push_back({text.substr(0, space), text.substr(space + 1)});
      } else if (entry.is_array() && entry.size() == 2 && entry[0].is_string() && entry[1].is_string()) {
        merges.push_back({entry[0].get_ref<const std::string&>(), entry[1].get_ref<const std::string&>()});
      } else {
        return missing("model.merges", "\"left right\" or [\"left\", \"right\"]", entry);
      }
    }
    CA_ASSIGN_OR_RETURN(const bool ignore_merges, get_bool(model, "ignore_merges", false));
    CA_ASSIGN_OR_RETURN(impl_->bpe, Bpe::create(impl_->vocabulary, merges, ignore_merges));
    return {};
  }

  Status read_normalizer(const Json& normalizer) {
    if (normalizer.is_null()) return {};
    return for_each_part(normalizer, "normalizer", "normalizers", [this](const Json&, const std::string& type) {
      if (type != "NFC") return unsupported_type("normalizer", type, "null, NFC");
      impl_->normalize_nfc = true;
      return Status();
    });
  }

  Status read_pre_tokenizer(const Json& pre_tokenizer) {
    constexpr std::string_view kAllowed = "Split and then ByteLevel";
    PreTokenizerConfig config;
    bool has_byte_level = false;
    if (pre_tokenizer.is_null()) return unsupported_type("pre_tokenizer", "null", kAllowed);
    CA_RETURN_IF_ERROR(for_each_part(
        pre_tokenizer, "pre_tokenizer", "pretokenizers", [&](const Json& part, const std::string& type) -> Status {
          if (has_byte_level) return unsupported_type("pre_tokenizer behind ByteLevel", type, "none");
          if (type == "Split") return read_split(part, config);
          if (type != "ByteLevel") return unsupported_type("pre_tokenizer", type, kAllowed);
          has_byte_level = true;
          CA_ASSIGN_OR_RETURN(config.add_prefix_space, get_bool(part, "add_prefix_space", true));
          CA_ASSIGN_OR_RETURN(config.byte_level_regex, get_bool(part, "use_regex", true));
          return {};
        }));
    if (!has_byte_level) return unsupported_type("pre_tokenizer", "without ByteLevel", kAllowed);
    CA_ASSIGN_OR_RETURN(impl_->pre_tokenizer, PreTokenizer::create(config));
    return {};
  }

  static Status read_split(const Json& split, PreTokenizerConfig& config) {
    CA_ASSIGN_OR_RETURN(const std::string behavior, get_string(split, "behavior"));
    if (behavior != "Isolated") return unsupported_type("pre_tokenizer Split with behavior", behavior, "Isolated");
    CA_ASSIGN_OR_RETURN(const bool invert, get_bool(split, "invert", false));
    if (invert) return unsupported("pre_tokenizer Split with invert true; allowed: false");
    const Json& pattern = get(split, "pattern");
    if (!pattern.is_object()) return missing("pre_tokenizer.pattern", "an object", pattern);
    if (!pattern.contains("Regex")) return unsupported("pre_tokenizer Split pattern without \"Regex\"; allowed: Regex");
    CA_ASSIGN_OR_RETURN(std::string regex, get_string(pattern, "Regex"));
    config.split_patterns.push_back(std::move(regex));
    return {};
  }

  Status read_added_tokens(const Json& list) {
    if (list.is_null()) return {};
    if (!list.is_array()) return missing("added_tokens", "an array", list);
    for (const Json& entry : list) {
      if (!entry.is_object()) return missing("added_tokens", "objects", entry);
      AddedToken token;
      CA_ASSIGN_OR_RETURN(token.content, get_string(entry, "content"));
      CA_ASSIGN_OR_RETURN(const int64_t id, get_id(get(entry, "id"), "added_tokens.id"));
      if (!get(entry, "special").is_boolean())
        return missing("added_tokens.special", "a boolean", get(entry, "special"));
      CA_ASSIGN_OR_RETURN(token.is_special, get_bool(entry, "special", false));
      CA_ASSIGN_OR_RETURN(token.is_normalized, get_bool(entry, "normalized", !token.is_special));
      for (const char* flag : {"single_word", "lstrip", "rstrip"}) {
        CA_ASSIGN_OR_RETURN(const bool is_set, get_bool(entry, flag, false));
        if (is_set) {
          return unsupported(fmt::format("added token \"{}\" with {} true; allowed: false", token.content, flag));
        }
      }
      CA_RETURN_IF_ERROR(add_token(std::move(token), id));
    }
    return {};
  }

  Status add_token(AddedToken token, int64_t id) {
    if (token.content.empty() || token.content.size() > kMaxAddedTokenBytes) {
      return io_error(
          fmt::format("added token {} has {} bytes; allowed: 1 to {}", id, token.content.size(), kMaxAddedTokenBytes));
    }
    if (id < 0 || id > kMaxTokenId) {
      return io_error(fmt::format("added token \"{}\" has id {}; allowed: 0 to {}", token.content, id, kMaxTokenId));
    }
    token.id = static_cast<int32_t>(id);
    if (impl_->added_by_id.contains(token.id) || impl_->added_by_content.contains(token.content)) {
      return io_error(fmt::format("added token \"{}\" (id {}) repeats a content or an id", token.content, id));
    }
    // A token may stand in the vocabulary too, then under the same id.
    const std::optional<int32_t> in_vocabulary = impl_->vocabulary.find_spelling(token.content);
    const bool id_is_taken = impl_->vocabulary.bytes_of(token.id).has_value();
    if (in_vocabulary ? *in_vocabulary != token.id : id_is_taken) {
      return io_error(
          fmt::format("added token \"{}\" has id {}, but the vocabulary says otherwise", token.content, id));
    }
    if (token.is_normalized && impl_->normalize_nfc) {
      if (token.is_special) {
        return unsupported(
            fmt::format("added token \"{}\" is special and normalized; allowed: one of them", token.content));
      }
      AddedToken searched = token;
      searched.content = to_nfc(token.content);
      impl_->added_after_normalizer.add(searched);
    } else {
      (token.is_normalized ? impl_->added_after_normalizer : impl_->added_before_normalizer).add(token);
    }
    impl_->vocab_size = std::max(impl_->vocab_size, token.id + 1);
    impl_->added_by_content.emplace(token.content, token.id);
    impl_->added_by_id.emplace(token.id, std::move(token));
    return {};
  }

  Status read_post_processor(const Json& post_processor) {
    if (post_processor.is_null()) return {};
    bool has_template = false;
    return for_each_part(post_processor, "post_processor", "processors",
                         [&](const Json& part, const std::string& type) -> Status {
                           if (type == "ByteLevel") return {};  // moves offsets, which we do not keep
                           if (type != "TemplateProcessing" || has_template) {
                             return unsupported_type("post_processor", type, "ByteLevel and one TemplateProcessing");
                           }
                           has_template = true;
                           return read_template(part);
                         });
  }

  Status read_template(const Json& processing) {
    const Json& single = get(processing, "single");
    if (!single.is_array()) return missing("post_processor.single", "an array", single);
    int32_t num_sequences = 0;
    for (const Json& piece : single) {
      if (piece.is_object() && piece.contains("Sequence")) {
        ++num_sequences;
        continue;
      }
      const Json& special = piece.is_object() ? get(piece, "SpecialToken") : piece;
      if (!special.is_object()) return missing("post_processor.single", "Sequence or SpecialToken", special);
      CA_ASSIGN_OR_RETURN(const std::string name, get_string(special, "id"));
      std::vector<int32_t>& ids = num_sequences == 0 ? impl_->prefix_ids : impl_->suffix_ids;
      CA_RETURN_IF_ERROR(read_template_ids(get(processing, "special_tokens"), name, ids));
    }
    if (num_sequences != 1) {
      return unsupported(fmt::format("post_processor.single with {} sequences; allowed: 1", num_sequences));
    }
    return {};
  }

  Status read_template_ids(const Json& special_tokens, const std::string& name, std::vector<int32_t>& ids) const {
    if (!special_tokens.is_object()) return missing("post_processor.special_tokens", "an object", special_tokens);
    const std::string key = fmt::format("post_processor.special_tokens.{}", name);
    const Json& entry = get(special_tokens, name);
    if (!entry.is_object()) return missing(key, "an object", entry);
    const Json& list = get(entry, "ids");
    if (!list.is_array()) return missing(key + ".ids", "an array", list);
    for (const Json& id_json : list) {
      CA_ASSIGN_OR_RETURN(const int64_t id, get_id(id_json, key));
      if (id < 0 || id >= impl_->vocab_size) {
        return io_error(fmt::format("{} has id {}; allowed: 0 to {}", key, id, impl_->vocab_size - 1));
      }
      ids.push_back(static_cast<int32_t>(id));
    }
    return {};
  }

  static Status read_decoder(const Json& decoder) {
    if (decoder.is_null()) return unsupported_type("decoder", "null", "ByteLevel");
    return for_each_part(decoder, "decoder", "decoders", [](const Json&, const std::string& type) {
      return type == "ByteLevel" ? Status() : unsupported_type("decoder", type, "ByteLevel");
    });
  }

  std::unique_ptr<Tokenizer::Impl> impl_ = std::make_unique<Tokenizer::Impl>();
};

Result<Tokenizer> Tokenizer::parse(std::string_view json, std::string_view name) {
  Result<Tokenizer> tokenizer = TokenizerReader::read(json);
  if (tokenizer.ok()) return tokenizer;
  const Status status = tokenizer.status();
  std::string message = status.message();
  if (message.size() > kMaxMessageBytes) {
    const std::string_view head = std::string_view(message).substr(0, kMaxMessageBytes);
    message = std::string(head.substr(0, utf8_valid_prefix_bytes(head))) + "...";
  }
  return Status(status.code(), fmt::format("{}: {}", name, message));
}

Result<Tokenizer> Tokenizer::load(const std::filesystem::path& tokenizer_json) {
  std::ifstream file(tokenizer_json, std::ios::binary);
  if (!file) return io_error(fmt::format("{}: cannot be opened", tokenizer_json.string()));
  const std::string json{std::istreambuf_iterator<char>(file), std::istreambuf_iterator<char>()};
  if (file.bad()) return io_error(fmt::format("{}: cannot be read", tokenizer_json.string()));
  return parse(json, tokenizer_json.string());
}

}  // namespace compact::engine
