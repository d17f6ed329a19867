//! The real FreeRADIUS, which writes accounting into a database of its own: SQLite, PostgreSQL or MariaDB.
//!
//! All of it runs in a namespace and a temporary folder, and ends with the value.

use std::fs::{self, File, Permissions};
use std::io::Write as _;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};
use std::{env, thread};

use anyhow::{Context as _, Result, bail, ensure};
use nix::sys::signal::Signal;
use tempfile::TempDir;

use crate::netns::{Namespace, Process};

/// Where Debian puts its configuration, of which schemas and statements are taken.
const CONFIGURATION: &str = "/etc/freeradius/3.0";
/// Ports in the namespace.
const ACCOUNTING: u16 = 21_813;
const DATABASE: u16 = 25_432;
/// How long a server may take to be ready.
const START: Duration = Duration::from_secs(60);

/// Which database.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A file.
    Sqlite,
    /// A server of Debian's `postgresql`.
    Postgres,
    /// A server of Debian's `mariadb-server`.
    MariaDb,
}

/// FreeRADIUS and its database.
#[derive(Debug)]
pub struct FreeRadius {
    namespace: Namespace,
    kind: Kind,
    folder: TempDir,
    server: Option<Process>,
    /// None where there is none, or it was stopped.
    database: Option<Process>,
}

impl Kind {
    /// What is not there of what it takes: a Debian package.
    #[must_use]
    pub fn missing(self) -> Option<&'static str> {
        let module = |name: &str| Path::new("/usr/lib/freeradius").join(name).exists();
        let there = |program: &str| self.program(program).is_some();
        match self {
            _ if !there("freeradius") || !Path::new(CONFIGURATION).is_dir() => Some("freeradius"),
            _ if !there("radclient") => Some("freeradius-utils"),
            Self::Postgres if !module("rlm_sql_postgresql.so") => Some("freeradius-postgresql"),
            Self::Postgres if !there("initdb") || !there("postgres") => Some("postgresql"),
            Self::MariaDb if !module("rlm_sql_mysql.so") => Some("freeradius-mysql"),
            Self::MariaDb if !there("mariadbd") || !there("mariadb-install-db") => Some("mariadb-server"),
            _ => None,
        }
    }

    /// Path of a program, those of PostgreSQL being out of the way.
    fn program(self, name: &str) -> Option<PathBuf> {
        let path = env::var_os("PATH").unwrap_or_default();
        let usual = env::split_paths(&path).chain(["/usr/sbin".into(), "/usr/bin".into()]);
        let versions = fs::read_dir("/usr/lib/postgresql").into_iter().flatten().flatten();
        let all = usual.chain(versions.map(|version| version.path().join("bin")));
        all.map(|folder| folder.join(name)).find(|path| path.is_file())
    }

    fn command(self, name: &str) -> Result<Command> {
        Ok(Command::new(self.program(name).with_context(|| format!("no {name}"))?))
    }

    /// A command as the user that the database's server insists on.
    fn server_command(self, user: &str, name: &str) -> Result<Command> {
        let mut command = Command::new("setpriv");
        command.args(["--reuid", user, "--regid", user, "--clear-groups", "--pdeathsig", "KILL"]);
        command.arg(self.program(name).with_context(|| format!("no {name}"))?);
        Ok(command)
    }

    const fn user(self) -> &'static str {
        match self {
            Self::Sqlite => "root",
            Self::Postgres => "postgres",
            Self::MariaDb => "mysql",
        }
    }
}

impl FreeRadius {
    /// Makes the database with the schema of FreeRADIUS, and starts both.
    ///
    /// # Errors
    /// When one of them can't be made or is not ready within a minute.
    pub fn start(namespace: &Namespace, kind: Kind) -> Result<Self> {
        let folder = tempfile::Builder::new().prefix("qos-freeradius-").tempdir().context("a folder")?;
        // Servers that are not root look into it.
        fs::set_permissions(folder.path(), Permissions::from_mode(0o755)).context("chmod")?;
        let mut radius = Self { namespace: namespace.clone(), kind, folder, server: None, database: None };
        radius.make_database()?;
        radius.start_database()?;
        radius.fill_database()?;
        radius.start_server()?;
        Ok(radius)
    }

    /// The database, as `qosd` is told of it.
    #[must_use]
    pub fn url(&self) -> String {
        match self.kind {
            Kind::Sqlite => format!("sqlite://{}", self.folder.path().join("radius.sqlite").display()),
            Kind::Postgres => format!("postgresql://postgres@127.0.0.1:{DATABASE}/radius"),
            Kind::MariaDb => format!("mariadb://qos:qos@127.0.0.1:{DATABASE}/radius"),
        }
    }

    /// Sends an accounting request of these attributes, as a BRAS does.
    ///
    /// # Errors
    /// When FreeRADIUS does not acknowledge it.
    pub fn account(&self, attributes: &str) -> Result<()> {
        let mut command = self.kind.command("radclient")?;
        command.args(["-r", "3", "-t", "5", &format!("127.0.0.1:{ACCOUNTING}"), "acct", "testing123"]);
        command.stdin(self.text("request", attributes)?);
        self.run(command, "radclient").with_context(|| attributes.to_owned())
    }

    /// Stops the database's server.
    ///
    /// # Errors
    /// When it doesn't end.
    pub fn stop_database(&mut self) -> Result<()> {
        if let Some(mut database) = self.database.take() {
            // PostgreSQL: at once, MariaDB: in order.
            let signal = if self.kind == Kind::Postgres { Signal::SIGQUIT } else { Signal::SIGTERM };
            database.signal(signal)?;
            database.wait(Duration::from_secs(20))?;
        }
        Ok(())
    }

    /// Starts the database's server, again after [`FreeRadius::stop_database`].
    ///
    /// # Errors
    /// When it is not ready within a minute.
    pub fn start_database(&mut self) -> Result<()> {
        let data = self.folder.path().join("data");
        let mut command = match self.kind {
            Kind::Sqlite => return Ok(()),
            Kind::Postgres => {
                let mut command = self.kind.server_command(self.kind.user(), "postgres")?;
                command.arg("-D").arg(&data).arg("-k").arg(&data).args([
                    "-h",
                    "127.0.0.1",
                    "-c",
                    "fsync=off",
                ]);
                command.args(["-p", &DATABASE.to_string()]);
                command
            }
            Kind::MariaDb => {
                let mut command = self.kind.server_command(self.kind.user(), "mariadbd")?;
                command.arg("--no-defaults").arg(format!("--datadir={}", data.display()));
                command.arg(format!("--socket={}", data.join("socket").display()));
                command.arg(format!("--pid-file={}", data.join("pid").display()));
                command.arg(format!("--port={DATABASE}")).arg("--bind-address=127.0.0.1");
                command
            }
        };
        self.log(&mut command, "database.log")?;
        self.database = Some(self.namespace.spawn(command)?);
        self.until("database.log", |radius| Ok(radius.sql_command("SELECT 1", None)?.status.success()))
    }

    fn make_database(&self) -> Result<()> {
        let data = self.folder.path().join("data");
        fs::create_dir(&data).context("a folder for the database")?;
        let mut command = match self.kind {
            Kind::Sqlite => return Ok(()),
            Kind::Postgres => {
                let mut command = self.kind.server_command(self.kind.user(), "initdb")?;
                command.arg("-D").arg(&data).args(["-A", "trust", "-U", "postgres", "--no-sync"]);
                command
            }
            Kind::MariaDb => {
                let mut command = self.kind.command("mariadb-install-db")?;
                command.arg("--no-defaults").arg(format!("--datadir={}", data.display()));
                command.args(["--user=mysql", "--auth-root-authentication-method=normal", "--skip-test-db"]);
                command
            }
        };
        let mut owner = Command::new("chown");
        owner.arg(self.kind.user()).arg(&data);
        self.run(owner, "chown")?;
        command.current_dir(self.folder.path());
        self.run(command, "making the database")
    }

    fn fill_database(&self) -> Result<()> {
        let schema = |dialect: &str| format!("{CONFIGURATION}/mods-config/sql/main/{dialect}/schema.sql");
        let (before, dialect) = match self.kind {
            // FreeRADIUS does it.
            Kind::Sqlite => return Ok(()),
            Kind::Postgres => ("CREATE DATABASE radius", "postgresql"),
            Kind::MariaDb => (
                "CREATE DATABASE radius; CREATE USER qos@'127.0.0.1' IDENTIFIED BY 'qos'; \
                 GRANT ALL ON radius.* TO qos@'127.0.0.1'",
                "mysql",
            ),
        };
        self.sql(before, None)?;
        let schema = fs::read_to_string(schema(dialect)).context("reading FreeRADIUS's schema")?;
        self.sql(&schema, Some("radius"))
    }

    /// Runs statements in a database of the server.
    fn sql(&self, statements: &str, database: Option<&str>) -> Result<()> {
        let output = self.sql_command(statements, database)?;
        ensure!(output.status.success(), "SQL: {}", String::from_utf8_lossy(&output.stderr));
        Ok(())
    }

    fn sql_command(&self, statements: &str, database: Option<&str>) -> Result<std::process::Output> {
        let mut command = match self.kind {
            Kind::Sqlite => bail!("SQLite has no server"),
            Kind::Postgres => {
                let mut command = self.kind.command("psql")?;
                command.args(["-q", "-v", "ON_ERROR_STOP=1", "-h", "127.0.0.1", "-U", "postgres"]);
                command.args(["-p", &DATABASE.to_string(), database.unwrap_or("postgres")]);
                command
            }
            Kind::MariaDb => {
                let mut command = self.kind.command("mariadb")?;
                let socket = self.folder.path().join("data/socket");
                command
                    .arg("--no-defaults")
                    .arg(format!("--socket={}", socket.display()))
                    .args(["-u", "root"]);
                command.args(database);
                command
            }
        };
        command.stdin(self.text("statements.sql", statements)?);
        self.namespace.output(command)
    }

    fn start_server(&mut self) -> Result<()> {
        let (dialect, driver, connection) = match self.kind {
            Kind::Sqlite => (
                "sqlite",
                "rlm_sql_sqlite",
                format!(
                    "sqlite {{\nfilename = \"{}\"\nbusy_timeout = 200\n\
                     bootstrap = \"{CONFIGURATION}/mods-config/sql/main/sqlite/schema.sql\"\n}}",
                    self.folder.path().join("radius.sqlite").display()
                ),
            ),
            Kind::Postgres => (
                "postgresql",
                "rlm_sql_postgresql",
                format!("server = \"127.0.0.1\"\nport = {DATABASE}\nlogin = \"postgres\"\npassword = \"\""),
            ),
            Kind::MariaDb => (
                "mysql",
                "rlm_sql_mysql",
                format!("server = \"127.0.0.1\"\nport = {DATABASE}\nlogin = \"qos\"\npassword = \"qos\""),
            ),
        };
        let text = include_str!("freeradius.conf")
            .replace("@FOLDER@", &self.folder.path().display().to_string())
            .replace("@CONFIGURATION@", CONFIGURATION)
            .replace("@PORT@", &ACCOUNTING.to_string())
            .replace("@DIALECT@", dialect)
            .replace("@DRIVER@", driver)
            .replace("@CONNECTION@", &connection);
        fs::write(self.folder.path().join("radiusd.conf"), text).context("writing radiusd.conf")?;
        let mut command = self.kind.command("freeradius")?;
        command.args(["-f", "-l", "stdout", "-n", "radiusd", "-d"]).arg(self.folder.path());
        self.log(&mut command, "freeradius.log")?;
        self.server = Some(self.namespace.spawn(command)?);
        self.until("freeradius.log", |radius| {
            Ok(radius.read("freeradius.log").contains("Ready to process requests"))
        })
    }

    fn until(&self, log: &str, reached: impl Fn(&Self) -> Result<bool>) -> Result<()> {
        let deadline = Instant::now() + START;
        while !reached(self)? {
            ensure!(Instant::now() < deadline, "not ready after {START:?}; {log}:\n{}", self.read(log));
            thread::sleep(Duration::from_millis(100));
        }
        Ok(())
    }

    fn run(&self, command: Command, what: &str) -> Result<()> {
        let output = self.namespace.output(command)?;
        ensure!(
            output.status.success(),
            "{what}: {}{}",
            String::from_utf8_lossy(&output.stdout),
            String::from_utf8_lossy(&output.stderr)
        );
        Ok(())
    }

    /// A file of a text, to be read from its beginning.
    fn text(&self, name: &str, text: &str) -> Result<Stdio> {
        let path = self.folder.path().join(name);
        File::create(&path).and_then(|mut file| file.write_all(text.as_bytes())).context("writing a file")?;
        Ok(Stdio::from(File::open(path).context("reading it again")?))
    }

    fn log(&self, command: &mut Command, name: &str) -> Result<()> {
        let log = File::options().create(true).append(true).open(self.folder.path().join(name));
        let log = log.context("a log")?;
        command.stdin(Stdio::null()).stdout(log.try_clone().context("a log")?).stderr(log);
        Ok(())
    }

    fn read(&self, name: &str) -> String {
        fs::read(self.folder.path().join(name))
            .map_or_else(|_| String::new(), |text| String::from_utf8_lossy(&text).into_owned())
    }
}

impl Drop for FreeRadius {
    fn drop(&mut self) {
        // It holds connections to the database; what does not end in order is killed with the value.
        self.server = None;
        let _ = self.stop_database();
    }
}
