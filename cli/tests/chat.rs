//! `folio` itself, run as a child of the test.
#![allow(clippy::unwrap_used, clippy::panic, reason = "tests fail by panicking")]

#[cfg(unix)]
use std::io::ErrorKind;
use std::io::{Read, Write};
use std::process::{Child, Command, Stdio};

use folio::{Gpu, GpuOptions};

/// The program. Its adapter is that of `FOLIO_ADAPTER`, as in the other tests.
fn folio(arguments: &[&str]) -> Child {
    let mut command = Command::new(env!("CARGO_BIN_EXE_folio"));
    command.args(arguments).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    command.spawn().unwrap()
}

/// Starts a chat. `None`: there is no adapter, and the test is to be skipped.
fn start(arguments: &[&str]) -> Option<Child> {
    let mut options = GpuOptions::default();
    options.adapter_name = std::env::var("FOLIO_ADAPTER").ok();
    if let Err(error) = Gpu::open_blocking(options) {
        assert!(std::env::var("FOLIO_REQUIRE_GPU").as_deref() != Ok("1"), "FOLIO_REQUIRE_GPU=1, but: {error}");
        eprintln!("skipped: {error}");
        return None;
    }
    Some(folio(&[&["chat"], arguments].concat()))
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
    let Some(mut child) = start(&["-n", "6", "-t", "0", "--verbose"]) else { return };
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
    assert!(!out.contains("first token"), "only --verbose reports: {out}");
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
    assert!(out.contains("Once upon a time"), "{out}");
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
fn the_picture_needs_a_terminal() {
    let (code, out, err) = finish(folio(&["chat", "--watch"]));
    assert_eq!((code, out.as_str()), (Some(1), ""));
    assert_eq!(err, "error: --watch: got a pipe or a file as stdin or stdout, need a terminal for both\n");
}

#[test]
fn what_is_missing_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().to_str().unwrap();
    let Some(child) = start(&["--model", path, "-p", "x"]) else { return };
    let (code, _, err) = finish(child);
    assert!(code == Some(1) && err.starts_with("error: ") && err.contains("tokenizer.json"), "{err}");
}

#[test]
fn completions_are_scripts_that_name_the_commands() {
    for (shell, begins) in [("bash", "_folio()"), ("zsh", "#compdef folio"), ("fish", "# Print an optspec")] {
        let (code, out, err) = finish(folio(&["completions", shell]));
        assert_eq!((code, err.as_str()), (Some(0), ""), "{shell}");
        assert!(out.starts_with(begins), "{shell}: {}", &out[..80.min(out.len())]);
        for name in ["chat", "serve", "completions", "branches"] {
            assert!(out.contains(name), "{shell}: {name}");
        }
    }
    let mut child = folio(&["completions", "bash"]);
    drop(child.stdout.take());
    let (code, _, err) = finish(child);
    assert_eq!((code, err.as_str()), (Some(0), ""), "a reader that has enough");
    let (code, _, err) = finish(folio(&["completions", "basic"]));
    assert!(code == Some(2) && err.contains("possible values: bash"), "{err}");
}

/// The shells that are there read their scripts.
#[test]
fn shells_take_the_completions() {
    for shell in ["bash", "zsh", "fish"] {
        let script = finish(folio(&["completions", shell])).1;
        let Ok(mut reading) = Command::new(shell).arg("-n").stdin(Stdio::piped()).stderr(Stdio::piped()).spawn() else {
            eprintln!("{shell} is not installed");
            continue;
        };
        reading.stdin.take().unwrap().write_all(script.as_bytes()).unwrap();
        let (code, _, err) = finish(reading);
        assert_eq!((code, err.as_str()), (Some(0), ""), "{shell}");
    }
}

/// The test's end of a terminal. Fails where nothing is shown for a minute, instead of waiting.
#[cfg(unix)]
struct Terminal(std::fs::File);

#[cfg(unix)]
impl Read for Terminal {
    fn read(&mut self, bytes: &mut [u8]) -> std::io::Result<usize> {
        let start = std::time::Instant::now();
        loop {
            match self.0.read(bytes) {
                Err(error) if error.kind() == ErrorKind::WouldBlock && start.elapsed().as_secs() < 60 => {
                    std::thread::sleep(std::time::Duration::from_millis(5));
                }
                result => return result,
            }
        }
    }
}

/// A terminal of the test's own: the test's end, and the program's.
#[cfg(unix)]
fn terminal() -> (Terminal, std::fs::File) {
    use rustix::fs::{Mode, OFlags, fcntl_setfl, open};
    use rustix::pty::{OpenptFlags, grantpt, openpt, ptsname, unlockpt};
    use rustix::termios::{Winsize, tcsetwinsize};
    let own = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
    grantpt(&own).unwrap();
    unlockpt(&own).unwrap();
    let name = ptsname(&own, Vec::new()).unwrap();
    let other = open(name, OFlags::RDWR | OFlags::NOCTTY, Mode::empty()).unwrap();
    tcsetwinsize(&own, Winsize { ws_row: 30, ws_col: 110, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    fcntl_setfl(&own, OFlags::RDWR | OFlags::NONBLOCK).unwrap();
    (Terminal(own.into()), other.into())
}

/// Whether what is typed comes line by line, and is shown.
#[cfg(unix)]
fn is_as_found(terminal: &std::fs::File) -> bool {
    use rustix::termios::{LocalModes, tcgetattr};
    tcgetattr(terminal).unwrap().local_modes.contains(LocalModes::ICANON | LocalModes::ECHO)
}

/// A chat beside the picture, and the two ends of its terminal, when the first answer is there.
#[cfg(unix)]
fn watched() -> Option<(Child, Terminal, std::fs::File)> {
    start(&["-p", "x", "-n", "1"]).map(finish)?;
    let (mut own, other) = terminal();
    let mut command = Command::new(env!("CARGO_BIN_EXE_folio"));
    command.args(["chat", "--watch", "-n", "8", "-t", "0", "-p", "Once upon a time"]);
    command.stdin(other.try_clone().unwrap()).stdout(other.try_clone().unwrap()).stderr(Stdio::piped());
    let child = command.spawn().unwrap();
    // "Enter says it" takes the place of another hint that begins with an E, and only what changes is drawn.
    let seen = read_until(&mut own, "nter s");
    assert!(seen.contains("\x1b[?1049h"), "it draws on a screen of its own: {seen:?}");
    assert!(!is_as_found(&other), "keys come one by one");
    Some((child, own, other))
}

#[cfg(unix)]
#[test]
fn the_picture_goes_when_one_has_had_enough() {
    let Some((mut child, mut own, other)) = watched() else { return };
    // Ctrl-C, as a key.
    own.0.write_all(b"\x03").unwrap();
    read_until(&mut own, "\x1b[?1049l");
    let said = read_until(&mut own, "> Once upon a time\r\n");
    assert!(said.contains("\x1b[?25h"), "the cursor is seen: {said:?}");
    assert_eq!(child.wait().unwrap().code(), Some(0));
    assert!(is_as_found(&other));
}

#[cfg(unix)]
#[test]
fn a_signal_takes_the_picture_away_too() {
    let Some((mut child, mut own, other)) = watched() else { return };
    let pid = child.id().to_string();
    // Two at once: the second ends the program wherever it is.
    assert!(Command::new("kill").args(["-INT", &pid]).status().unwrap().success());
    let _ = Command::new("kill").args(["-INT", &pid]).status();
    read_until(&mut own, "\x1b[?1049l");
    assert!(matches!(child.wait().unwrap().code(), Some(0 | 130)));
    assert!(is_as_found(&other));
}

#[test]
fn a_gguf_file_is_a_model() {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../tests/fixtures/gguf/qwen2/model.gguf");
    let path = file.to_str().unwrap();
    // The weights are random, so that any text is right; that it is one turn of the template's, `--verbose` says.
    for weights in ["f16", "int4"] {
        let Some(child) =
            start(&["--model", path, "-p", "Hi", "-n", "4", "-t", "0", "--verbose", "--weights", weights])
        else {
            return;
        };
        let (code, out, err) = finish(child);
        assert_eq!(code, Some(0), "{err}");
        // The name of the file without its end.
        assert!(err.contains("model: 0."), "{err}");
        // <|im_start|>, user, a line, Hi, <|im_end|>, a line, <|im_start|>, assistant, a line: more than the text alone.
        let prompt = out.lines().find(|line| line.starts_with("prompts")).unwrap();
        let tokens: u32 = prompt.split_whitespace().nth(1).unwrap().parse().unwrap();
        assert!(tokens >= 9, "{prompt}");
    }
    let missing = folio(&["chat", "--model", "nowhere.gguf", "-p", "Hi"]);
    let (code, _, err) = finish(missing);
    assert!(code == Some(1) && err.contains("nowhere.gguf"), "{err}");
}
