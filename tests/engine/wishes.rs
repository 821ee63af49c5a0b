//! What requests may ask for beside tokens: log-probabilities, answers of a form, speed by drafts.

use folio::engine::{EndReason, Engine, EngineOptions, Event, Grammar, PromptLookup, Request, SubmitError};
use folio::model::{LogitRows, Sampling};
use folio::{ErrorKind, KvFormat};

use super::{Collected, TOKENIZER, collect, decoder, drawn, engine, prompt};

/// The story model's token for the end of a text.
const END: u32 = 1;

fn run(engine: &mut Engine, request: Request) -> Collected {
    let answer = engine.submit(request).unwrap();
    engine.run_blocking().unwrap();
    collect(answer)
}

#[test]
fn log_probabilities_are_those_of_the_models_logits() {
    let Some(reference) = decoder(32, KvFormat::F32, false) else { return };
    let mut engine = engine(decoder(32, KvFormat::F32, false).unwrap(), EngineOptions::default());
    let mut sampling = drawn(3);
    sampling.top_k = Some(5);
    sampling.repetition_penalty = 1.3;
    let request = Request::new(prompt("The cat"), 8).with_sampling(sampling);
    let plain = run(&mut engine, request.clone());
    assert!(plain.logprobs.iter().all(Option::is_none));
    let answer = run(&mut engine, request.clone().with_logprobs(4));
    assert_eq!(answer.tokens, plain.tokens);
    // The same text through the decoder, all at once.
    let (mut reference, text) = (reference, [&request.prompt, &answer.tokens[..]].concat());
    let sequence = reference.create_sequence();
    let gpu = reference.gpu().clone();
    let rows = gpu.block_on(reference.logits(&[(sequence, &text)], LogitRows::All)).unwrap().remove(0);
    let vocab = reference.model().config().vocab_size as usize;
    for (i, (&token, logprob)) in answer.tokens.iter().zip(&answer.logprobs).enumerate() {
        let logprob = logprob.as_ref().unwrap();
        let row = &rows[(request.prompt.len() - 1 + i) * vocab..][..vocab];
        let log_sum = row.iter().map(|&x| f64::from(x).exp()).sum::<f64>().ln();
        let want = |token: u32| f64::from(row[token as usize]) - log_sum;
        assert!((f64::from(logprob.logprob) - want(token)).abs() < 1e-4, "token {i}");
        assert_eq!(logprob.top.len(), 4);
        assert!(logprob.top.is_sorted_by(|a, b| a.1 >= b.1));
        let others = (0..vocab as u32).filter(|token| logprob.top.iter().all(|top| top.0 != *token));
        let best_other = others.map(want).fold(f64::NEG_INFINITY, f64::max);
        for &(token, value) in &logprob.top {
            assert!((f64::from(value) - want(token)).abs() < 1e-4 && want(token) > best_other - 1e-4, "token {i}");
        }
    }
    let too_many = engine.submit(request.with_logprobs(vocab as u32 + 1)).unwrap_err();
    assert!(too_many.to_string().contains("logprobs"), "{too_many}");
}

/// Drafts change how many steps there are, and not the tokens.
#[test]
fn drafts_save_steps_and_change_nothing() {
    let Some(first) = decoder(64, KvFormat::F32, false) else { return };
    // Answers repeat the words of the story.
    let text = "Title: Mia and the silver key\nOnce upon a time, in autumn, there was a little town where everybody knew everybody. \
        Mia was a baker from Willow Hill. Mia loved plum cake more than anything. Tom was a sailor from Stone Bay. Tom loved onion soup more \
        than anything.\nThe day was still young. Mia hid the silver key under the old bridge. Tom put the red lantern inside the dark cave.\n\
        Question: Who was Mia?\nAnswer:";
    let request = Request::new(prompt(text), 12);
    let steps = |engine: &mut Engine| {
        let answer = engine.submit(request.clone()).unwrap();
        let (gpu, mut steps) = (engine.gpu().clone(), 0);
        let (mut drafts, mut accepted) = (0, 0);
        while !engine.is_idle() {
            let report = gpu.block_on(engine.step()).unwrap();
            drafts += report.draft_tokens;
            accepted += report.accepted_tokens;
            steps += 1;
        }
        let answer = collect(answer);
        assert_eq!((answer.usage.drafted_tokens, answer.usage.accepted_tokens), (drafts, accepted));
        (answer, steps)
    };
    let mut plain = engine(first, EngineOptions::default());
    let (want, plain_steps) = steps(&mut plain);
    let drafting = engine(decoder(64, KvFormat::F32, false).unwrap(), EngineOptions::default());
    let mut drafting = drafting.with_proposer(PromptLookup::default());
    let (got, few_steps) = steps(&mut drafting);
    assert_eq!(got.tokens, want.tokens);
    let accepted = got.usage.accepted_tokens;
    assert!(accepted > 3 && plain_steps - few_steps == accepted, "{few_steps} steps of {plain_steps}: {:?}", got.usage);
}

#[cfg(feature = "grammar")]
#[test]
fn answers_follow_their_grammar() {
    let Some(first) = decoder(64, KvFormat::F32, false) else { return };
    let mut engine = engine(first, EngineOptions::default());
    let mut eager = PromptLookup::default();
    (eager.min_match, eager.branches) = (1, 3);
    let mut drafting =
        super::engine(decoder(64, KvFormat::F32, false).unwrap(), EngineOptions::default()).with_proposer(eager);
    let schema = r#"{"type": "object", "additionalProperties": false, "required": ["name", "age"],
        "properties": {"name": {"type": "string", "maxLength": 8}, "age": {"type": "integer", "minimum": 1, "maximum": 99}}}"#;
    let lark = "start: (\"ha\" | \"ho\")+ \"!\"";
    let forms = [
        Grammar::JsonSchema(schema.to_owned()),
        Grammar::Regex("(yes|no), (Mia|Tom) (is|was) [a-z]{2,6}\\.".to_owned()),
        Grammar::Lark(lark.to_owned()),
    ];
    for (i, form) in forms.iter().enumerate() {
        for seed in 0..4 {
            let request = Request::new(prompt("Mia and Tom. Mia was"), 80)
                .with_sampling(if seed == 0 { Sampling::greedy() } else { drawn(seed) })
                .with_stops([END], [])
                .with_grammar(form.clone());
            let answer = run(&mut engine, request.clone());
            let text = answer.text.as_str();
            let ended = matches!(answer.reason, EndReason::StopToken(END) | EndReason::Complete);
            assert!(ended || i == 2, "{text:?}: {}", answer.reason);
            match i {
                0 => {
                    let value: serde_json::Value = serde_json::from_str(text).unwrap();
                    let object = value.as_object().unwrap();
                    assert!(object.len() == 2 && object["name"].as_str().unwrap().chars().count() <= 8, "{text}");
                    assert!((1..=99).contains(&object["age"].as_i64().unwrap()), "{text}");
                }
                1 => {
                    let rest = text.strip_prefix("yes, ").or(text.strip_prefix("no, ")).unwrap();
                    let mut words = rest.strip_suffix('.').unwrap().split(' ');
                    assert!(matches!(words.next(), Some("Mia" | "Tom")), "{text}");
                    assert!(matches!(words.next(), Some("is" | "was")), "{text}");
                    let word = words.next().unwrap();
                    assert!((2..=6).contains(&word.len()) && word.bytes().all(|c| c.is_ascii_lowercase()), "{text}");
                }
                _ => {
                    let laughs = text.strip_suffix('!').unwrap_or(text);
                    assert!(laughs.replace("ha", "").replace("ho", "").len() <= 1, "{text}");
                }
            }
            let again = run(&mut drafting, request);
            assert_eq!((again.tokens, again.reason), (answer.tokens, answer.reason), "with drafts");
        }
    }
    assert!(drafting.decoder().usage().sequences == 0);
}

#[cfg(feature = "grammar")]
#[test]
fn what_is_no_grammar_is_refused() {
    let Some(first) = decoder(32, KvFormat::F32, false) else { return };
    let mut with = engine(first, EngineOptions::default());
    let request = |grammar: Grammar| Request::new(prompt("The cat"), 5).with_stops([END], []).with_grammar(grammar);
    let huge = format!("({})", "a|".repeat(1 << 20));
    let deep = format!("{}{}", "{\"items\":".repeat(5000), "}".repeat(5000));
    for bad in [
        Grammar::JsonSchema("{".to_owned()),
        Grammar::JsonSchema(r#"{"type": "nothing"}"#.to_owned()),
        Grammar::JsonSchema(r##"{"$ref": "#/nowhere"}"##.to_owned()),
        Grammar::JsonSchema(deep),
        Grammar::Regex("(".to_owned()),
        Grammar::Regex(huge),
        Grammar::Lark("start: nothing".to_owned()),
        Grammar::Lark(String::new()),
    ] {
        let Err(SubmitError::Invalid(error)) = with.submit(request(bad.clone())) else { panic!("{bad:?} is taken") };
        assert!(error.to_string().starts_with("grammar: got"), "{error}");
        assert_eq!(error.kind(), ErrorKind::Caller, "{error}");
    }
    let any = Grammar::Regex("[a-z]+".to_owned());
    let endless = with.submit(Request::new(prompt("The cat"), 5).with_grammar(any.clone())).unwrap_err();
    assert!(endless.to_string().contains("stop_tokens"), "{endless}");
    let mut without = Engine::new(decoder(32, KvFormat::F32, false).unwrap(), None, EngineOptions::default()).unwrap();
    let error = without.submit(request(any.clone())).unwrap_err();
    assert!(error.to_string().contains("tokenizer"), "{error}");
    // Nothing of it is left, and others go on.
    let answer = run(&mut with, request(any));
    let text: String = answer.text;
    assert!(!text.is_empty() && text.bytes().all(|c| c.is_ascii_lowercase()), "{text:?}");
    assert_eq!(with.num_requests(), 0);
    let _ = &*TOKENIZER;
}

/// Events of a spawned engine carry the same.
#[test]
fn events_of_a_thread_have_log_probabilities() {
    let Some(decoder) = decoder(32, KvFormat::F32, false) else { return };
    let handle = engine(decoder, EngineOptions::default()).spawn().unwrap();
    let mut answer = handle.client().submit_blocking(Request::new(prompt("The cat"), 3).with_logprobs(0)).unwrap();
    let mut seen = 0;
    while let Some(event) = answer.next_blocking() {
        if let Event::Token { logprob, .. } = event {
            let logprob = logprob.unwrap();
            assert!(logprob.logprob < 0.0 && logprob.top.is_empty());
            seen += 1;
        }
    }
    assert_eq!(seen, 3);
    handle.finish().unwrap();
}
