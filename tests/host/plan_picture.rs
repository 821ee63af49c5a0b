//! The picture of a plan in the documentation is what the example draws.

#[path = "../../examples/plan_picture.rs"]
mod example;

#[test]
fn the_picture_is_that_of_a_plan() {
    let file = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/plan.svg");
    let drawn = example::picture().expect("a plan");
    let stored = std::fs::read_to_string(file).expect("the picture");
    assert!(stored == drawn, "cargo run --no-default-features --example plan_picture -- docs/plan.svg");
    // A rectangle for each block and each of the 22 work items, at least.
    assert!(drawn.matches("<rect").count() >= 280 + 22, "{drawn}");
}
