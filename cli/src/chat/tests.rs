//! The conversation on a small cache. The program itself is run by tests/chat.rs.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::cell::RefCell;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;

use clap::{CommandFactory, Parser};
use folio::kernel::tuning::Tuning;
use folio::model::{Decoder, Model, ModelOptions, Tokenizer};
use folio::{Gpu, GpuOptions, KvFormat};
use tempfile::TempDir;

use super::options::Options;
use super::screen::{Interrupts, Screen, is_closed_pipe};
use super::session::Session;
use crate::load::{Loaded, tuned};
use crate::template::{ChatTemplate, Message};
use crate::{Cli, Command};

fn parse(arguments: &[&str]) -> Result<Options, String> {
    let arguments = [&["folio", "chat"], arguments].concat();
    match Cli::try_parse_from(arguments).map_err(|error| error.to_string())?.command {
        Command::Chat(options) => Ok(*options),
        _ => Err("another command".to_owned()),
    }
}

#[test]
fn arguments_are_refused_before_anything_is_loaded() {
    for (arguments, want) in [
        (["-n", "0"], "0 is not in 1.."),
        (["-n", "-1"], "-1 is not in 1.."),
        (["-t", "-1"], "temperature: got -1, need a finite number, at least 0"),
        (["-t", "warm"], "got \"warm\", need a number"),
        (["--top-k", "0"], "0 is not in 1.."),
        (["--top-p", "-0.5"], "top_p: got -0.5, need a number above 0 and at most 1"),
        (["--min-p", "2"], "min_p: got 2"),
        (["--repetition-penalty", "0"], "repetition_penalty: got 0"),
        (["--blocks", "0"], "0 is not in 1.."),
        (["--block-size", "0"], "0 is not in 1..=256"),
        (["--branches", "-3"], "-3 is not in 1..=64"),
        (["--system=Be brief.", "--raw"], "cannot be used with"),
    ] {
        let error = parse(&arguments).err().unwrap_or_else(|| panic!("{arguments:?} is taken"));
        assert!(error.contains(want), "{arguments:?}: {error}");
    }
    let options = parse(&["-t", "0.5", "-p", "-1 is less than", "--seed", "18446744073709551615"]).unwrap();
    assert_eq!((options.temperature, &options.prompt[0][..]), (Some(0.5), "-1 is less than"));
    assert_eq!(options.sampling(1, 0.8).seed, 0, "branches have seeds of their own");
}

#[test]
fn help_lists_what_there_is() {
    let mut cli = Cli::command();
    let help = cli.find_subcommand_mut("chat").unwrap().render_long_help().to_string();
    for format in KvFormat::ALL {
        assert!(help.contains(&format.to_string().to_ascii_lowercase()), "{format}");
    }
    for word in ["GPT-2", "Llama", "Mistral", "Qwen2", "Qwen3", "GPT-NeoX", "f32, f16, int8 or int4"] {
        assert!(help.contains(word), "{word}");
    }
}

#[derive(Clone, Default)]
struct Shared(Rc<RefCell<String>>);

impl Write for Shared {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.borrow_mut().push_str(std::str::from_utf8(bytes).unwrap());
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Shared {
    fn take(&self) -> String {
        std::mem::take(&mut self.0.borrow_mut())
    }
}

/// Takes some bytes, then nobody reads.
struct Closed(usize);

impl Write for Closed {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0 = self.0.checked_sub(bytes.len()).ok_or(io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[test]
fn notes_begin_on_lines_of_their_own() {
    let both = Shared::default();
    let mut screen = Screen::new(both.clone(), both.clone());
    screen.note("a");
    screen.say("b").unwrap();
    screen.note("c");
    screen.say("d\n").unwrap();
    screen.note("e");
    assert_eq!(both.take(), "a\nb\nc\nd\ne\n");
}

/// With the story model; what it says to stdout and stderr, both in one.
fn session(arguments: &[&str]) -> Option<(Session, Shared)> {
    let both = Shared::default();
    Some((session_on(arguments, Screen::new(both.clone(), both.clone()))?, both))
}

/// The adapter. `None`: there is none, and the test is to be skipped.
fn open() -> Option<Gpu> {
    let mut gpu_options = GpuOptions::default();
    gpu_options.adapter_name = std::env::var("FOLIO_ADAPTER").ok();
    match Gpu::open_blocking(gpu_options) {
        Ok(gpu) => Some(gpu),
        Err(error) => {
            assert!(std::env::var("FOLIO_REQUIRE_GPU").as_deref() != Ok("1"), "FOLIO_REQUIRE_GPU=1, but: {error}");
            eprintln!("skipped: {error}");
            None
        }
    }
}

fn stories() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("models/stories")
}

fn session_on(arguments: &[&str], screen: Screen) -> Option<Session> {
    let gpu = open()?;
    let options = parse(arguments).unwrap();
    let folder = options.load.model.clone().unwrap_or_else(stories);
    let model = Model::load_blocking(&gpu, &folder, ModelOptions::new(options.load.weights), |_| {}).unwrap();
    let stop_tokens = model.config().eos_token_ids.clone();
    let decoder_options = options.load.decoder(model.config(), options.branches);
    let decoder = Decoder::new_blocking(Arc::new(model), decoder_options).unwrap();
    let tokenizer = Tokenizer::from_file(&folder).unwrap();
    let template = ChatTemplate::from_folder(&folder).unwrap();
    let loaded = Loaded { gpu, decoder, tokenizer, template, name: "stories".to_owned(), stop_tokens };
    Some(Session::new(options, loaded, screen, Interrupts::default()).unwrap())
}

#[test]
fn a_prompt_longer_than_the_context_is_refused_and_the_talk_goes_on() {
    let Some((mut session, seen)) = session(&["-n", "4", "-t", "0"]) else { return };
    assert!(session.turn("Once upon a time").unwrap());
    let first = seen.take();
    assert!(!session.turn(&"the silver key ".repeat(4000)).unwrap());
    let refused = seen.take();
    assert!(refused.starts_with("[not said: it has ") && refused.contains("tokens, and the model takes "), "{refused}");
    assert!(session.turn("Where is the key?").unwrap());
    assert!(!seen.take().contains('['), "the conversation is as it was");
    // Twice half of the context: the second begins a new conversation.
    let half = "Tom loved onion soup. ".repeat(200);
    assert!(session.turn(&half).unwrap());
    let mut anew = false;
    for _ in 0..3 {
        assert!(session.turn(&half).unwrap());
        anew |= seen.take().contains("a new conversation begins]");
    }
    assert!(anew);
    assert!(!session.turn("").unwrap());
    assert!(seen.take().contains("[got no text"));
    // And the same again from the start.
    let Some((mut other, said)) = self::session(&["-n", "4", "-t", "0"]) else { return };
    assert!(other.turn("Once upon a time").unwrap());
    assert_eq!(said.take(), first);
}

#[test]
fn what_was_said_stays_when_the_cache_is_full() {
    for branches in ["1", "2"] {
        // 4 blocks of 16 tokens.
        let arguments = ["-n", "200", "-t", "0", "--blocks", "4", "-b", branches];
        let Some((mut session, seen)) = session(&arguments) else { return };
        assert!(session.turn("Once upon a time").unwrap());
        let first = seen.take();
        assert!(first.len() > 60 && first.ends_with("\n[the cache is full: the answer ends here]\n"), "{first}");
        // Branches leave some room: all but one end.
        let mut second = String::new();
        for _ in 0..3 {
            assert!(session.turn("Once upon a time").unwrap());
            second = seen.take();
            if second.contains("new conversation") {
                break;
            }
        }
        assert!(second.starts_with("[the cache's 4 blocks are full: a new conversation begins]\n"), "{second}");
        assert!(second.ends_with(&first), "{second}");
        assert!(!session.turn(&"the silver key ".repeat(30)).unwrap());
        let refused = seen.take();
        assert!(refused.contains("and the cache has room for 64]"), "{refused}");
        session.report().unwrap();
        assert!(seen.take().contains("of 4 used"));
    }
}

#[test]
fn an_interrupted_answer_keeps_what_was_said() {
    let Some((mut session, seen)) = session(&["-n", "30", "-t", "0"]) else { return };
    assert!(session.turn("Once upon a time").unwrap());
    let whole = seen.take();
    let Some((mut session, seen)) = self::session(&["-n", "30", "-t", "0"]) else { return };
    // The press comes when the first words are out.
    struct Press(Shared, Interrupts);
    impl Write for Press {
        fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
            self.1.press();
            self.0.write(bytes)
        }
        fn flush(&mut self) -> io::Result<()> {
            Ok(())
        }
    }
    session.screen = Screen::new(Press(seen.clone(), session.interrupts.clone()), seen.clone());
    assert!(session.turn("Once upon a time").unwrap());
    let cut = seen.take();
    let said = cut.strip_suffix("\n[stopped]\n").unwrap_or_else(|| panic!("{cut}"));
    assert!(!said.is_empty() && whole.starts_with(said) && whole.len() > said.len() + 20, "{cut}");
    session.screen = Screen::new(seen.clone(), seen.clone());
    assert!(session.turn(" there was").unwrap(), "the next answer is not interrupted");
    assert!(!seen.take().contains("[stopped]"));
}

#[test]
fn a_closed_pipe_is_an_error_and_no_panic() {
    let Some(mut session) = session_on(&["-n", "50"], Screen::new(Closed(30), Closed(0))) else { return };
    let error = session.recite(["Once upon a time"]).unwrap_err();
    assert!(is_closed_pipe(&error), "{error:#}");
}

/// The story model with a template.
fn with_template(template: &str) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for file in ["config.json", "model.safetensors", "tokenizer.json"] {
        std::fs::copy(stories().join(file), folder.path().join(file)).unwrap();
    }
    let config = serde_json::json!({ "chat_template": template, "bos_token": "<|begin|>" });
    std::fs::write(folder.path().join("tokenizer_config.json"), config.to_string()).unwrap();
    folder
}

const MESSAGES: &str = "{{ bos_token }}{% for message in messages %}{{ '\\n' + message.role + ': ' + message.content }}{% endfor %}\
    {% if add_generation_prompt %}{{ '\\nassistant:' }}{% endif %}";

#[test]
fn turns_of_a_template_feed_what_is_new() {
    let folder = with_template(MESSAGES);
    let path = folder.path().to_str().unwrap();
    let Some((mut session, seen)) = session(&["--model", path, "-n", "12", "-t", "0", "--system", "A tale."]) else {
        return;
    };
    assert!(session.turn("Once upon a time").unwrap());
    let answer = seen.take();
    let first = session.num_fed();
    assert!(session.turn("Who was Mia?").unwrap());
    let (second, text) = (session.num_fed() - first, session.text().unwrap());
    let messages = [
        Message::new("system", "A tale."),
        Message::new("user", "Once upon a time"),
        Message::new("assistant", answer.trim()),
        Message::new("user", "Who was Mia?"),
    ];
    let template = ChatTemplate::from_folder(folder.path()).unwrap().unwrap();
    let rendered = template.render(&messages, true).unwrap();
    let want = Tokenizer::from_file(folder.path()).unwrap().encode(&rendered, false).unwrap();
    assert!(rendered.starts_with("<|begin|>\nsystem: A tale.\nuser: ") && text.starts_with(&want), "{rendered}");
    // The first turn and its answer are there already, but for a token or two where the answer was cut off.
    assert!(second < want.len() - first, "{second} of {} fed, after {first}", want.len());
}

#[test]
fn a_template_may_write_earlier_turns_in_another_way() {
    // Of earlier answers only the first letter stays.
    let folder =
        with_template(&MESSAGES.replace(
            "message.content }}",
            "(message.content[:1] if message.role == 'assistant' else message.content) }}",
        ));
    let path = folder.path().to_str().unwrap();
    let Some((mut session, seen)) = session(&["--model", path, "-n", "20", "-t", "0"]) else { return };
    assert!(session.turn("Once upon a time").unwrap());
    let answer = seen.take();
    let long = session.text().unwrap().len();
    assert!(session.turn("Who?").unwrap());
    let rendered =
        format!("<|begin|>\nuser: Once upon a time\nassistant: {}\nuser: Who?\nassistant:", &answer.trim()[..1]);
    let want = Tokenizer::from_file(folder.path()).unwrap().encode(&rendered, false).unwrap();
    let text = session.text().unwrap();
    assert!(text.starts_with(&want) && text.len() < long + 20, "{long}, then {}", text.len());
}

#[test]
fn a_template_that_refuses_a_turn_leaves_the_conversation_as_it_was() {
    let folder = with_template(
        &("{% if messages[-1].content == 'bad' %}{{ raise_exception('no bad words') }}{% endif %}".to_owned()
            + MESSAGES),
    );
    let path = folder.path().to_str().unwrap();
    let Some((mut session, seen)) = session(&["--model", path, "-n", "5", "-t", "0"]) else { return };
    assert!(session.turn("Once upon a time").unwrap());
    let before = session.text().unwrap();
    seen.take();
    assert!(!session.turn("bad").unwrap());
    let refused = seen.take();
    assert!(refused.starts_with("[not said: ") && refused.contains("no bad words"), "{refused}");
    assert_eq!(session.text().unwrap(), before);
    assert!(session.turn("good").unwrap());
    assert!(!session.turn(&"the silver key ".repeat(4000)).unwrap());
    assert!(seen.take().contains("tokens, and the model takes 1024]"));
}

#[test]
fn a_system_text_needs_a_template() {
    let Some(gpu) = open() else { return };
    let options = parse(&["--system", "Be brief."]).unwrap();
    let model = Model::load_blocking(&gpu, stories(), ModelOptions::new(options.load.weights), |_| {}).unwrap();
    let decoder_options = options.load.decoder(model.config(), 1);
    let decoder = Decoder::new_blocking(Arc::new(model), decoder_options).unwrap();
    let tokenizer = Tokenizer::from_file(stories()).unwrap();
    let loaded = Loaded { gpu, decoder, tokenizer, template: None, name: String::new(), stop_tokens: Vec::new() };
    let both = Shared::default();
    let screen = Screen::new(both.clone(), both);
    let error = Session::new(options, loaded, screen, Interrupts::default()).err().unwrap();
    assert_eq!(error.to_string(), "--system: the model has no chat template, need one that has");
}

#[test]
fn a_tuning_must_be_one_for_this_adapter() {
    let Some(gpu) = open() else { return };
    let folder = tempfile::tempdir().unwrap();
    let own = Tuning::new(gpu.tuned_for());
    let mut foreign = own.clone();
    foreign.tuned_for.adapter = "another GPU".into();
    let json = |tuning: &Tuning| serde_json::to_string(tuning).unwrap();
    for (text, want) in [
        (Some(json(&own)), None),
        (None, Some("No such file")),
        (Some(json(&own)[..40].to_owned()), Some("not a tuning: EOF")),
        (Some("{\"kernels\": []}".to_owned()), Some("not a tuning: missing field `for`")),
        (Some(json(&foreign)), Some("tuning: got one for another GPU")),
    ] {
        let file = folder.path().join("tuning.json");
        let _ = std::fs::remove_file(&file);
        if let Some(text) = &text {
            std::fs::write(&file, text).unwrap();
        }
        match (tuned(&gpu, &file), want) {
            (Ok(tuned), None) => assert_eq!(tuned.tuning(), Some(&own)),
            (Err(error), Some(want)) => assert!(format!("{error:#}").contains(want), "{error:#}"),
            (got, want) => panic!("{text:?}: {got:?}, not {want:?}"),
        }
    }
}
