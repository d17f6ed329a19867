//! `--keep`: what can be done with the network that goes on running.

use std::env;

use anyhow::{Context as _, Result};

use crate::network::Network;
use crate::scenario::GAME;
use crate::story::Results;

/// Prints the commands.
pub(crate) fn explain(network: &Network, results: &Results) -> Result<()> {
    let folder = network.daemon().binaries();
    let game = results.held.iter().find(|held| held.title == GAME.title);
    let id = game.context("the game was granted a level")?.allocation.id;
    println!();
    println!("Network, daemon and traffic go on until Ctrl-C. In another shell, as root:");
    println!();
    println!("  export QOS_SOCKET={}", network.daemon().socket().display());
    println!("  export PATH={}:$PATH", env::join_paths([folder])?.to_string_lossy());
    for line in [
        "qos list".to_owned(),
        "qos stats --watch".to_owned(),
        "qos session list".to_owned(),
        format!("qos show {id}"),
        "qos explain --direction down --protocol udp --source 203.0.113.20:9000 --destination 192.0.2.10:5000"
            .to_owned(),
        "qos grant --provider isp --flow 'down to 192.0.2.20' --max-down 5mbit --for 1m".to_owned(),
        format!("qos revoke {id}"),
        "qos status".to_owned(),
        "qos doctor".to_owned(),
    ] {
        println!("  {line}");
    }
    println!();
    println!("Each machine is a network namespace. Programs of yours run there with:");
    println!();
    for (name, namespace) in network.namespaces() {
        println!("  nsenter --net={} sh    # {name}", namespace.path().display());
    }
    println!();
    println!("What qosd says: {}", network.daemon().log_path().display());
    Ok(())
}
