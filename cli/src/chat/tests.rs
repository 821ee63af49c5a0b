//! The conversation on a small cache, and the program itself, run as a child of the test.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

use std::cell::RefCell;
use std::io::{self, Read, Write};
use std::process::{Child, Command, Stdio};
use std::rc::Rc;
use std::sync::Arc;

use clap::{CommandFactory, Parser};
use folio::kernel::tuning::Tuning;
use folio::model::{Decoder, Model, ModelOptions, Tokenizer};
use folio::{Gpu, GpuOptions, KvFormat};

use crate::options::Options;
use crate::screen::{Interrupts, Screen, is_closed_pipe};
use crate::session::Session;

fn parse(arguments: &[&str]) -> Result<Options, String> {
    let arguments = [&["chat"], arguments].concat();
    Options::try_parse_from(arguments).map_err(|error| error.to_string())
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
    let help = Options::command().render_help().to_string();
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

fn session_on(arguments: &[&str], screen: Screen) -> Option<Session> {
    let gpu = open()?;
    let options = parse(arguments).unwrap();
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models/stories");
    let model = Model::load_blocking(&gpu, folder, ModelOptions::new(options.weights), |_| {}).unwrap();
    let decoder_options = options.decoder(model.config());
    let decoder = Decoder::new_blocking(Arc::new(model), decoder_options).unwrap();
    let tokenizer = Tokenizer::from_file(folder).unwrap();
    Some(Session::new(options, decoder, tokenizer, screen, Interrupts::default()))
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
        assert!(refused.contains("and the cache 4 blocks of 16]"), "{refused}");
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

const ARGUMENTS: &str = "FOLIO_CHAT_ARGUMENTS";

/// The program, when a test below runs it as a child.
#[test]
#[ignore = "run by other tests"]
fn program() {
    let Ok(arguments) = std::env::var(ARGUMENTS) else { return };
    let code = crate::run(parse(&arguments.split('\n').collect::<Vec<_>>()).unwrap());
    // ExitCode doesn't tell its value.
    std::process::exit(i32::from(code != std::process::ExitCode::SUCCESS));
}

/// Starts the program, its stdout behind libtest's own first line.
fn start(arguments: &[&str]) -> Option<Child> {
    // One that skips, or fails, without an adapter.
    session(&[])?;
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "tests::program", "--ignored", "--nocapture", "--test-threads=1"]);
    let adapter = std::env::var("FOLIO_ADAPTER").map(|name| format!("--adapter\n{name}\n")).unwrap_or_default();
    command.env(ARGUMENTS, adapter + &arguments.join("\n"));
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    Some(command.spawn().unwrap())
}

/// Reads until a text has come.
fn read_until(from: &mut impl Read, text: &str) -> String {
    let mut seen = Vec::new();
    let mut byte = [0];
    while !String::from_utf8_lossy(&seen).contains(text) {
        assert_eq!(from.read(&mut byte).unwrap(), 1, "no {text:?} in {}", String::from_utf8_lossy(&seen));
        seen.push(byte[0]);
    }
    String::from_utf8_lossy(&seen).into_owned()
}

fn finish(child: Child) -> (Option<i32>, String, String) {
    let output = child.wait_with_output().unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    (output.status.code(), text(output.stdout), text(output.stderr))
}

#[test]
fn piped_lines_are_prompts() {
    let Some(mut child) = start(&["-n", "6", "-t", "0"]) else { return };
    child.stdin.take().unwrap().write_all(b"Once upon a time\r\n\n\xffWhere is the key?").unwrap();
    let (code, out, err) = finish(child);
    assert_eq!(code, Some(0), "{err}");
    let position = |text| out.find(text).unwrap_or_else(|| panic!("{text:?} in {out}"));
    assert!(position("Once upon a time") < position("\u{fffd}Where is the key?"), "{out}");
    assert!(!out.contains("Mia and the silver key") && out.contains("first token"), "{out}");
}

#[test]
fn without_any_prompt_there_is_a_conversation() {
    let Some(mut child) = start(&["-n", "6", "-t", "0"]) else { return };
    drop(child.stdin.take());
    let (code, out, err) = finish(child);
    assert_eq!(code, Some(0), "{err}");
    assert!(out.contains("Title: Mia and the silver key") && out.contains("Who was Mia?"), "{out}");
}

#[test]
fn a_reader_that_has_enough_ends_it() {
    let Some(mut child) = start(&["-p", "Once upon a time", "-n", "300"]) else { return };
    let mut out = child.stdout.take().unwrap();
    read_until(&mut out, "Once upon a time");
    drop(out);
    let (code, _, err) = finish(child);
    assert!(code == Some(0) && !err.contains("panicked"), "{code:?}: {err}");
}

#[test]
fn a_refused_prompt_shows_in_the_exit_code() {
    let long = "the silver key ".repeat(4000);
    let Some(child) = start(&["-p", &long, "-p", "Once upon a time", "-n", "3"]) else { return };
    let (code, out, err) = finish(child);
    assert!(code == Some(1) && err.contains("[not said: it has"), "{code:?}: {err}");
    assert!(out.contains("first token"), "{out}");
}

#[cfg(unix)]
#[test]
fn control_c_ends_the_answer_and_twice_the_program() {
    let Some(mut child) = start(&["-n", "4000"]) else { return };
    let (mut stdin, mut out) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut err = child.stderr.take().unwrap();
    let pid = child.id().to_string();
    let interrupt = || assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    writeln!(stdin, "Once upon a time").unwrap();
    read_until(&mut out, "Once upon a time");
    out.read_exact(&mut [0; 12]).unwrap();
    interrupt();
    read_until(&mut err, "[stopped]");
    // It goes on: the next prompt is answered, and a press ends that answer, too.
    writeln!(stdin, "Later the clouds").unwrap();
    read_until(&mut out, "Later the clouds");
    out.read_exact(&mut [0; 12]).unwrap();
    interrupt();
    read_until(&mut err, "[stopped]");
    interrupt();
    drop((out, err));
    assert_eq!(child.wait().unwrap().code(), Some(130));
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
        match (crate::tuned(&gpu, &file), want) {
            (Ok(tuned), None) => assert_eq!(tuned.tuning(), Some(&own)),
            (Err(error), Some(want)) => assert!(format!("{error:#}").contains(want), "{error:#}"),
            (got, want) => panic!("{text:?}: {got:?}, not {want:?}"),
        }
    }
}
