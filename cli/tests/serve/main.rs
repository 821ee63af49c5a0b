//! `folio serve` from outside: the binary with the story model, and clients that mean well or ill.
//!
//! One server for all tests, since loading takes most of the time. The tests that stop it come last.
#![allow(clippy::unwrap_used, clippy::panic, clippy::print_stderr, reason = "tests fail by panicking")]

mod answers;
mod fuzz;
mod harness;
mod load;
mod protocol;
mod recorded;
mod stop;

use std::process::ExitCode;
use std::sync::Arc;

use libtest_mimic::{Arguments, Trial};

use harness::{Server, Test};

fn main() -> ExitCode {
    let arguments = Arguments::from_args();
    let parts = [answers::TESTS, protocol::TESTS, recorded::TESTS, fuzz::TESTS];
    // Alone, one after another: they fill the server, then look whether it is empty, then stop it.
    let alone = [load::TESTS, stop::TESTS].into_iter().flatten().copied();
    let parts = parts.into_iter().flatten().copied();
    if arguments.list {
        let _ = libtest_mimic::run(&arguments, parts.chain(alone).map(|test| trial(None, test)).collect());
        return ExitCode::SUCCESS;
    }
    let Some(server) = Server::start() else { return ExitCode::SUCCESS };
    let server = Arc::new(server);
    let mut has_failed = false;
    let mut run = |tests: Vec<Test>| {
        let trials = tests.into_iter().map(|test| trial(Some(Arc::clone(&server)), test)).collect();
        has_failed |= libtest_mimic::run(&arguments, trials).has_failed();
    };
    run(parts.collect());
    alone.for_each(|test| run(vec![test]));
    if has_failed {
        eprintln!("--- log of the server ---\n{}", server.log());
        return ExitCode::FAILURE;
    }
    ExitCode::SUCCESS
}

fn trial(server: Option<Arc<Server>>, (name, test): Test) -> Trial {
    Trial::test(name, move || {
        if let Some(server) = server {
            server.run(test);
        }
        Ok(())
    })
}
